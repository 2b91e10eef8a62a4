//! What goes wrong, the same for every cloud.

use crate::Answer;

/// What a request is for, whatever a cloud calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Whose key this is.
    Check,
    /// What can be rented.
    Offers,
    /// The call that rents an instance.
    Create,
    /// All instances.
    List,
    /// One instance.
    Get,
    /// Ends an instance.
    Terminate,
    /// Registers, lists or removes SSH keys.
    Keys,
}

/// Why a cloud does not do what it is asked; each dialect has its own words for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Sold out.
    NoCapacity,
    /// The key is none.
    Unauthorized,
    /// The account cannot pay.
    Funds,
    /// The request is wrong; says what.
    Invalid(String),
    /// Too many requests; seconds to wait, if the cloud says.
    RateLimited(Option<u64>),
    /// There is no such thing.
    NotFound,
    /// The cloud's own failure, with this status.
    Broken(u16),
}

/// Something that will go wrong.
#[derive(Clone, Debug)]
pub struct Fault {
    /// With requests of this kind.
    pub on: Op,
    /// Whether the cloud does what it is asked and only its answer goes wrong.
    pub applied: bool,
    /// In which way.
    pub how: How,
    /// With how many requests.
    pub times: u32,
}

/// How an answer goes wrong.
#[derive(Clone, Debug)]
pub enum How {
    /// It is a refusal in the cloud's own words.
    Refuse(Refusal),
    /// It is this.
    Say(Answer),
    /// It never comes.
    Hang,
    /// The connection breaks in the middle of the body.
    CutBody,
    /// It is a success whose body is half a JSON document.
    NotJson,
    /// It is a success whose body is a JSON document of another form.
    OtherJson,
    /// It is a success whose body is a web page.
    Html,
    /// It is a success without a body.
    Empty,
    /// It is a refusal that repeats the request's key.
    EchoKey,
}
