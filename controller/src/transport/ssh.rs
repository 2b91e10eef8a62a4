//! [`Transport`](super::Transport) over SSH.
