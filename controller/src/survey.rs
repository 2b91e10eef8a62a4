//! A survey: many models, one file that names them ([`file`]), what is known of each ([`member`]),
//! and the index that says so to readers of its results ([`index`]).

pub mod file;
pub mod index;
pub mod member;

pub use file::{Survey, SurveyError, SurveyModel, is_commit};
pub use index::{Index, IndexEntry, ModelOutcome};
pub use member::{Member, outcome};
