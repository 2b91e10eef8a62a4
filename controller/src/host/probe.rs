//! Probes what a rented host really is.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::retry::again;
use super::{HostError, RemoteHost, ScriptOutput, TIMEOUT};
use crate::units::{Bytes, CudaVersion};

/// Facts about a host. `None`: the host does not report it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// `Linux`, `Darwin`.
    pub os: String,
    /// `x86_64`, `aarch64`.
    pub arch: String,
    /// Login user.
    pub user: String,
    /// Absolute path of its home folder.
    pub home: String,
    /// CPU cores available to the user.
    pub cores: Option<u32>,
    /// Memory, or the container's limit where there is one.
    pub ram: Option<Bytes>,
    /// Free disk in the home folder.
    pub disk_free: Option<Bytes>,
    /// The host's clock minus the local clock in seconds, exact to about a round trip.
    pub clock_skew: Option<i64>,
    /// Whether the host reaches the hub, where it was tried.
    pub hub: Option<bool>,
    /// Newest CUDA version that the driver supports.
    pub cuda: Option<CudaVersion>,
    /// NVIDIA GPUs, in the driver's order.
    pub gpus: Vec<GpuFacts>,
}

/// A GPU as the driver reports it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuFacts {
    /// Index in `cuda:<index>`.
    pub index: u32,
    /// `NVIDIA A100-SXM4-80GB`.
    pub name: String,
    /// Its memory.
    pub memory: Option<Bytes>,
    /// Driver version.
    pub driver: String,
    /// Stable identifier.
    pub uuid: String,
}

/// Prints a host's facts, one line `@key value` each. `nvidia-smi` hangs on a GPU that fell off
/// the bus, so it gets 20 seconds where `timeout` exists.
///
/// On a cluster the job's script runs this on the node, and its answer arrives over the shared
/// file system.
pub const SCRIPT: &str = r#"
if [ -n "${outliers_job:-}" ]; then
  i=0; while [ ! -f "$HOME/facts" ] && [ $i -lt 45 ]; do i=$((i + 1)); sleep 1; ls "$HOME" > /dev/null; done
  grep -v '^@clock ' "$HOME/facts"
  exit 0
fi
echo "@uname $(uname -sm | tail -n 1)"
echo "@user $(id -un)"
echo "@home $HOME"
echo "@cores $( (nproc || getconf _NPROCESSORS_ONLN || sysctl -n hw.ncpu) 2>/dev/null | head -n 1)"
if [ -r /proc/meminfo ]; then
  echo "@ram $(sed -n 's/^MemTotal: *\([0-9]*\) kB.*/\1/p' /proc/meminfo)"
else
  b=$(sysctl -n hw.memsize 2>/dev/null) && echo "@ram $((b / 1024))"
fi
for f in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do
  [ -r $f ] && echo "@limit $(cat $f)"
done
echo "@disk $(df -Pk "$HOME" | tail -n 1)"
echo "@clock $(date +%s)"
if command -v nvidia-smi >/dev/null 2>&1; then
  t=; command -v timeout >/dev/null 2>&1 && t='timeout 20'
  $t nvidia-smi --query-gpu=index,name,memory.total,driver_version,uuid --format=csv,noheader,nounits 2>/dev/null |
    sed 's/^/@gpu /'
  echo "@cuda $($t nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' | head -n 1)"
fi
:
"#;

impl RemoteHost {
    /// Probes the host with one command.
    pub async fn probe(&self) -> Result<HostFacts, HostError> {
        Ok(again!(TIMEOUT, &|_| {}, self.probe_once()))
    }

    async fn probe_once(&self) -> Result<HostFacts, HostError> {
        let before = SystemTime::now();
        let answer = self.sh(SCRIPT, Duration::from_secs(90)).await?;
        let facts = read(&answer, before, SystemTime::now());
        match facts.os.is_empty() || !facts.home.starts_with('/') {
            true => Err(self.odd("its answer lacks the system or the home folder")),
            false => Ok(facts),
        }
    }
}

fn read(answer: &ScriptOutput, before: SystemTime, after: SystemTime) -> HostFacts {
    let uname = answer.field("uname");
    let (os, arch) = uname.split_once(' ').unwrap_or((&uname, ""));
    let ram = answer.number("ram").map(|kib| kib.saturating_mul(1024));
    // Without a limit the value is `max`, or close to 2^63.
    let limit = answer.fields("limit").iter().filter_map(|text| text.trim().parse::<u64>().ok()).min();
    HostFacts {
        os: os.to_owned(),
        arch: arch.to_owned(),
        user: answer.field("user"),
        home: answer.field("home"),
        cores: answer.number("cores").and_then(|n| u32::try_from(n).ok()),
        ram: ram.into_iter().chain(limit).min().map(Bytes),
        disk_free: free_kib(&answer.field("disk")).map(|kib| Bytes(kib.saturating_mul(1024))),
        clock_skew: answer.number("clock").and_then(|theirs| skew(theirs, before, after)),
        hub: ["no", "yes"].iter().position(|word| answer.field("hub") == *word).map(|at| at == 1),
        cuda: answer.field("cuda").parse().ok(),
        gpus: answer.fields("gpu").iter().filter_map(|line| gpu(line)).take(64).collect(),
    }
}

/// Available KiB in a line of `df -Pk`. The file system's name may contain blanks, so columns are
/// counted from the percentage.
pub(crate) fn free_kib(line: &str) -> Option<u64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let percent = words.iter().position(|word| word.ends_with('%'))?;
    words.get(percent.checked_sub(1)?)?.parse().ok()
}

fn skew(theirs: u64, before: SystemTime, after: SystemTime) -> Option<i64> {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok().map(|d| d.as_secs() as i64);
    let (theirs, before, after) = (i64::try_from(theirs).ok()?, seconds(before)?, seconds(after)?);
    // A time between the two local readings means no skew.
    Some(theirs - theirs.clamp(before.min(after), after))
}

fn gpu(line: &str) -> Option<GpuFacts> {
    let mut parts = line.split(',').map(str::trim);
    let index = parts.next()?.parse().ok()?;
    let name = parts.next()?.to_owned();
    let mib = parts.next()?.parse::<u64>().ok();
    let mut text = || parts.next().unwrap_or_default().to_owned();
    Some(GpuFacts { index, name, memory: mib.map(Bytes::from_mib), driver: text(), uuid: text() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> ScriptOutput {
        ScriptOutput { status: Some(0), stdout: text.as_bytes().to_vec(), stderr: String::new() }
    }

    #[test]
    fn gpu_machine_is_parsed() {
        let text = "@uname Linux x86_64\n@user root\n@home /root\n@cores 8\n@ram 65536000\n@limit max\n@limit 34359738368\n\
                    @disk overlay 104857600 20971520 83886080 20% /\n@clock 1000\n\
                    @gpu 0, NVIDIA A100-SXM4-80GB, 81920, 550.54.15, GPU-1\n@gpu junk\n@gpu 1, X, [N/A], 1, G\n\
                    @hub no\n";
        let at = |s| UNIX_EPOCH + Duration::from_secs(s);
        let facts = read(&answer(text), at(900), at(902));
        assert_eq!((facts.os.as_str(), facts.arch.as_str(), facts.cores), ("Linux", "x86_64", Some(8)));
        assert_eq!(facts.ram, Some(Bytes(34_359_738_368)));
        assert_eq!(facts.disk_free, Some(Bytes(83_886_080 * 1024)));
        assert_eq!((facts.clock_skew, facts.hub), (Some(98), Some(false)));
        assert_eq!(facts.gpus.len(), 2);
        assert_eq!(facts.gpus[0].memory, Some(Bytes::from_mib(81920)));
        assert_eq!((facts.gpus[0].driver.as_str(), facts.gpus[1].memory), ("550.54.15", None));
    }

    #[test]
    fn silent_or_hostile_machine_does_not_panic() {
        let text = format!("@uname\n@ram {}\n@limit 99999999999999999999\n@disk %\n@clock {}\n", u64::MAX, u64::MAX);
        let facts = read(&answer(&text), UNIX_EPOCH, UNIX_EPOCH);
        assert_eq!((facts.cores, facts.disk_free, facts.clock_skew, facts.gpus.len()), (None, None, None, 0));
        assert_eq!(free_kib("map auto home 0 0 17 100% /home"), Some(17));
    }
}
