//! Commands on an instance, in its home folder and environment.

use std::sync::Arc;

use super::processes::MARKER;
use super::record::Folder;
use crate::cloud::broker::InstanceTransport;
use crate::host::transport::local::LocalTransport;

/// User name of an instance.
pub(super) const USER: &str = "outliers";

/// Search path on an instance, including GPU drivers in containers.
const PATH: &str =
    "/usr/local/nvidia/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Access to the instance `id` in `folder`.
pub(super) fn transport(id: &str, folder: Folder) -> InstanceTransport {
    let home = folder.home();
    let home = home.canonicalize().unwrap_or(home);
    // The instance sees only the GPUs it rented.
    let gpus = folder.record().map(|record| record.gpus).unwrap_or_default();
    let gpus = gpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let place = home.to_string_lossy().into_owned();
    let variables = [
        ("PATH", PATH),
        ("LANG", "C.UTF-8"),
        ("SHELL", "/bin/sh"),
        ("USER", USER),
        ("LOGNAME", USER),
        (MARKER, id),
        ("HOME", place.as_str()),
        ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        ("CUDA_VISIBLE_DEVICES", gpus.as_str()),
    ];
    let environment = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let words = environment.iter().map(|(name, value)| format!("{name}={value}"));
    let program = ["sh", "-c", "cd && exec sh \"$@\"", "sh"].map(str::to_owned);
    let shell = ["env", "-i", "TERM=xterm"].map(str::to_owned).into_iter().chain(words).chain(program).collect();
    let name = format!("instance {id}");
    let transport = LocalTransport::new(name.clone(), home, environment, move || folder.admit());
    InstanceTransport { transport: Arc::new(transport), name, shell, needs_guard: true }
}
