//! Faults, the same for every cloud.

use crate::ApiResponse;

/// Kind of a request, for all clouds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads the account of a key.
    Check,
    /// Lists offers.
    Offers,
    /// Rents an instance.
    Create,
    /// Lists instances.
    List,
    /// Reads one instance.
    Get,
    /// Ends an instance.
    Terminate,
    /// Registers, lists or removes SSH keys.
    Keys,
}

/// Why a cloud refuses a request. Each dialect makes its own answer of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Sold out.
    NoCapacity,
    /// The key is invalid.
    Unauthorized,
    /// The account cannot pay.
    Funds,
    /// The request is invalid; with the cause.
    Invalid(String),
    /// Too many requests; seconds to wait, if the cloud reports them.
    RateLimited(Option<u64>),
    /// Not found.
    NotFound,
    /// A server error with this status.
    Broken(u16),
}

/// A fault to inject.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Kind of the requests.
    pub on: Op,
    /// Whether the request takes effect and only its answer is faulty.
    pub applied: bool,
    /// How the answer is faulty.
    pub how: How,
    /// Number of requests.
    pub times: u32,
}

/// How an answer is faulty.
#[derive(Clone, Debug)]
pub enum How {
    /// The cloud's refusal.
    Refuse(Refusal),
    /// This answer.
    Say(ApiResponse),
    /// No answer.
    Hang,
    /// The connection breaks within the body.
    CutBody,
    /// Status 200 with half a JSON document.
    NotJson,
    /// Status 200 with a JSON document of another form.
    OtherJson,
    /// Status 200 with a web page.
    Html,
    /// Status 200 without a body.
    Empty,
    /// A refusal that repeats the request's key.
    EchoKey,
}
