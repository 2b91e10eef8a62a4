//! Staging: a job on a node that reaches the hub fetches a model into the lease's folder. The run's
//! own job waits for it.

use std::time::Duration;

use super::cluster::TOKEN;
use super::{Sku, Slurm};
use crate::cloud::broker::Stage;
use crate::host::transport::quote::quote;

/// Path of the staged model, relative to `outliers/<run>` in the lease's folder.
pub const STAGED: &str = "../../model";
/// Suffix of a staging job's name, after the lease's tag.
pub(super) const SUFFIX: &str = "-stage";
/// Script of the job, after its own variables.
const JOB: &str = include_str!("stage.sh");
/// Memory of the job in MiB.
const MEM_MIB: u64 = 1024;

/// Shell text for the submission of a staged lease.
#[derive(Default)]
pub(super) struct Staging {
    /// Appends commands that write the job's files.
    pub(super) write: String,
    /// Submits the job, and sets `$after` to the options of the job that waits for it.
    pub(super) submit: String,
}

impl Slurm {
    /// The staging job of a lease with this tag and folder, in a partition.
    pub(super) fn staging(&self, partition: &str, stage: &Stage, tag: &str, folder: &str, time: Duration) -> Staging {
        let sku = Sku {
            host: self.site.host.clone(),
            scratch: None,
            partition: partition.to_owned(),
            gpus: 0,
            gpu_type: None,
            cpus: 1,
            mem_mib: MEM_MIB,
            limit_s: None,
        };
        let mut options = self.limits(&sku, time);
        options.extend(self.site.account.iter().map(|account| format!("--account={account}")));
        options.extend([format!("--job-name={tag}{SUFFIX}"), "--parsable".to_owned(), "--requeue".to_owned()]);
        options.extend(["--output=stage.log", "--open-mode=append"].map(str::to_owned));
        options.push(self.deadline(time));
        let options: Vec<String> = options.iter().map(|option| quote(option)).collect();
        let base = format!("{}/{}/resolve/{}", self.site.hub.trim_end_matches('/'), stage.model, stage.commit);
        let script = format!("#!/bin/sh\nBASE={}\n{JOB}", quote(&base));
        let files: String = stage.files.iter().map(|file| format!("{} {}\n", file.bytes, file.name)).collect();
        let (folder, script, files) = (quote(folder), quote(&script), quote(&files));
        Staging {
            write: format!(
                " && printf '%s' {script} > {folder}/stage.sh && printf '%s' {files} > {folder}/stage.files && \
                 printf '%s' \"${{{TOKEN}:-}}\" > {folder}/.token"
            ),
            submit: format!(
                "if sbatch --chdir=\"$PWD\" {} < stage.sh > sbatch.out 2> sbatch.log; then\n\
                   after=\"--dependency=afterok:$(cut -d ';' -f 1 < sbatch.out) --kill-on-invalid-dep=yes\"\n\
                 else echo \"@refused the staging job: $(tail -n 3 sbatch.log | tr '\\n' ' ')\"; exit 0; fi\n",
                options.join(" "),
            ),
        }
    }
}
