//! The user's own machine as a cloud.
