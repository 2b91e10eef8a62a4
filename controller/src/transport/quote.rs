//! Quoting of remote arguments, in one place.
