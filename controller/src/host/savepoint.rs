//! Local copies of save points, from which a new instance continues.

use std::path::Path;

use outliers_protocol::files;

use super::{HostError, RemoteHost, SHORT, names};
use crate::host::transport::quote::quote;
use crate::units::Bytes;

/// Identity of a save point file: size, time and inode. Each new save point is renamed over the
/// old one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stamp(String);

impl RemoteHost {
    /// Fetches a run's save point, unless it is `seen` or larger than `limit`. Returns `true` if
    /// it fetched a new one.
    pub async fn fetch_save_point(
        &self,
        run: &str,
        into: &Path,
        limit: Bytes,
        seen: &mut Stamp,
    ) -> Result<bool, HostError> {
        let path = format!("{}/{}", self.run_folder(run).await?, files::SAVE_POINT);
        let script = format!(
            "f={}\n[ -f \"$f\" ] && [ ! -h \"$f\" ] && echo \"@save $(stat -c '%s %Y %i' \"$f\")\"\n:",
            quote(&path)
        );
        let stamp = Stamp(self.sh(&script, SHORT).await?.field("save"));
        let size: Option<u64> = stamp.0.split(' ').next().and_then(|size| size.parse().ok());
        if stamp == *seen || size.is_none_or(|size| size > limit.0) {
            return Ok(false);
        }
        self.transport.get(&path, into, limit.0).await?;
        *seen = stamp;
        Ok(true)
    }

    /// Uploads a save point for the run's worker, before it is started. The worker verifies it.
    pub async fn put_save_point(&self, run: &str, from: &Path) -> Result<(), HostError> {
        names::check_run(run)?;
        self.push_file(from, &format!("outliers/{run}/{}", files::SAVE_POINT), u64::MAX, &|_| {}).await?;
        Ok(())
    }
}
