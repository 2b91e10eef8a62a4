//! Surveys of many models: the survey's [`file`], the state of each `member`, and the `index`
//! for readers of the results.

pub mod file;
pub(crate) mod index;
pub(crate) mod member;

pub use file::{Survey, SurveyError, SurveyModel, is_commit};
pub(crate) use index::{Index, IndexEntry, ModelOutcome};
pub(crate) use member::{Member, Members};
