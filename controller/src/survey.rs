//! Surveys of many models: the survey's [`file`], the state of each [`member`], and the [`index`]
//! for readers of the results.

pub mod file;
pub mod index;
pub mod member;

pub use file::{Survey, SurveyError, SurveyModel, is_commit};
pub use index::{Index, IndexEntry, ModelOutcome};
pub use member::{Member, Members};
