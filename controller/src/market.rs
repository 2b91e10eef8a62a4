//! Offers, filtered and ranked.
