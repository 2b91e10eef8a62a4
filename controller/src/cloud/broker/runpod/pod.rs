//! A pod in REST v2 (`GET /v2/pods`, `GET /v2/pods/{id}`).

use serde::Deserialize;
use serde_json::Value;

use super::{NAME, sku};
use crate::calendar::from_rfc3339;
use crate::cloud::broker::wire::{self, lenient};
use crate::cloud::broker::{Instance, InstanceState, SshEndpoint};
use crate::text::clean;
use crate::units::UsdPerHour;

#[derive(Deserialize)]
pub(super) struct Page {
    /// Entries are parsed one by one.
    pub(super) pods: Vec<Value>,
    #[serde(default)]
    pagination: Option<Pagination>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pagination {
    has_next_page: bool,
    #[serde(default)]
    next_cursor: Option<String>,
}

impl Page {
    /// Cursor of the next page; `None` after the last.
    ///
    /// # Errors
    /// The page announces another without a cursor.
    pub(super) fn next(&self) -> Result<Option<String>, &'static str> {
        match &self.pagination {
            Some(Pagination { has_next_page: true, next_cursor: None }) => {
                Err("its list of pods has a next page that it does not name")
            }
            Some(Pagination { has_next_page: true, next_cursor }) => Ok(next_cursor.clone()),
            _ => Ok(None),
        }
    }
}

/// Id and name are required: without them the owner is unknown.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Pod {
    #[serde(deserialize_with = "wire::id")]
    id: String,
    name: String,
    #[serde(default, deserialize_with = "lenient")]
    status: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    gpu: Option<Gpu>,
    /// Dollars per hour, without disk.
    #[serde(default, deserialize_with = "lenient")]
    cost: Option<f64>,
    /// Container disk in GB.
    #[serde(default, deserialize_with = "lenient")]
    disk: Option<u64>,
    #[serde(default, deserialize_with = "lenient")]
    ssh: Option<Ssh>,
    #[serde(default, deserialize_with = "lenient")]
    runtime: Option<Runtime>,
    #[serde(default, deserialize_with = "lenient")]
    created_at: Option<String>,
}

#[derive(Deserialize)]
struct Gpu {
    id: String,
    #[serde(default = "one")]
    count: u32,
}

const fn one() -> u32 {
    1
}

/// SSH addresses. Only one of the two kinds transfers files.
#[derive(Deserialize)]
struct Ssh {
    direct: Option<Direct>,
}

#[derive(Deserialize)]
struct Direct {
    host: String,
    port: u16,
    username: String,
}

#[derive(Deserialize)]
struct Runtime {
    /// Seconds since the container started.
    #[serde(default, deserialize_with = "lenient")]
    uptime: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    ports: Option<Vec<Port>>,
}

#[derive(Deserialize)]
struct Port {
    private: Option<u16>,
    public: Option<u16>,
    r#type: Option<String>,
    ip: Option<String>,
}

impl Pod {
    /// The pod as an instance; `None`: it has ended.
    pub(super) fn instance(&self) -> Option<Instance> {
        Some(Instance {
            price: self.price(),
            hardware: self.gpu.as_ref().map_or("CPU only".to_owned(), |gpu| wire::hardware(gpu.count, &gpu.id, None)),
            created_at: self.created_at.as_deref().and_then(from_rfc3339),
            ..Instance::new(NAME, &self.id, &self.name, self.state()?)
        })
    }

    fn state(&self) -> Option<InstanceState> {
        Some(match self.status.as_deref().unwrap_or_default() {
            "PROVISIONING" | "STARTING" => InstanceState::Booting,
            "RUNNING" => self.endpoint().map_or(InstanceState::Booting, InstanceState::Ready),
            "EXITED" => InstanceState::Stopped,
            "ERROR" => InstanceState::Failed("RunPod says ERROR".to_owned()),
            "TERMINATED" => return None,
            other => InstanceState::Unknown(clean(other.as_bytes(), 60)),
        })
    }

    /// Address of its SSH server, once its container runs.
    fn endpoint(&self) -> Option<SshEndpoint> {
        let runtime = self.runtime.as_ref();
        if runtime.and_then(|runtime| runtime.uptime) == Some(0.0) {
            return None;
        }
        let direct = self.ssh.as_ref().and_then(|ssh| ssh.direct.as_ref());
        let direct = direct.and_then(|direct| wire::endpoint(&direct.username, &direct.host, direct.port));
        direct.or_else(|| runtime?.ports.iter().flatten().find_map(Port::ssh))
    }

    /// Of a pod that is not stopped, a cost of zero is not its cost.
    fn price(&self) -> Option<UsdPerHour> {
        let (cost, is_stopped) = (self.cost?, self.status.as_deref() == Some("EXITED"));
        match cost == 0.0 {
            // It keeps its container disk for free.
            true => is_stopped.then(UsdPerHour::default),
            false => sku::price(cost, self.disk?).ok(),
        }
    }
}

impl Port {
    fn ssh(&self) -> Option<SshEndpoint> {
        let is_ssh = self.private == Some(22) && self.r#type.as_deref() == Some("tcp");
        is_ssh.then_some(())?;
        wire::endpoint("root", self.ip.as_deref()?, self.public?)
    }
}
