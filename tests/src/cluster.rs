//! A cluster: a real OpenSSH server as the login node, with Slurm or with a fake of Slurm's
//! commands.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::programs::workspace;
use crate::sshd::Sshd;

/// Longer than Slurm's daemons need to connect on a busy machine.
const COMES_UP: Duration = Duration::from_secs(180);

/// See the module. Everything ends on drop.
pub struct Cluster {
    /// The login node.
    pub sshd: Sshd,
    folder: TempDir,
    /// Slurm's daemons; empty with the fake.
    daemons: Vec<Child>,
    environment: Vec<(String, String)>,
}

impl Cluster {
    /// A login node with `tests/slurm/fake_slurm.sh`. `None`, with a message, without an OpenSSH
    /// server.
    ///
    /// # Errors
    /// Files cannot be written, or the server does not start.
    pub fn fake() -> Result<Option<Self>> {
        let folder = tempfile::tempdir()?;
        let commands = folder.path().join("bin");
        fs::create_dir(&commands)?;
        for name in ["sbatch", "squeue", "scancel", "sinfo", "sacct", "scontrol"] {
            std::os::unix::fs::symlink(workspace().join("tests/slurm/fake_slurm.sh"), commands.join(name))?;
        }
        let state = folder.path().to_string_lossy().into_owned();
        let environment = vec![search_path(&[commands]), ("SLURM_STAND_IN".to_owned(), state)];
        Self::behind(folder, environment)
    }

    /// A login node with Slurm's daemons and one node of this machine's processors. The daemons
    /// are those of Debian's packages `slurmctld`, `slurmd` and `slurm-client`, below the folder
    /// `OUTLIERS_SLURM` if they were only unpacked. `None`, with a message, without them.
    ///
    /// # Errors
    /// The daemons do not start.
    pub fn real() -> Result<Option<Self>> {
        let root = std::env::var_os("OUTLIERS_SLURM").map_or_else(|| PathBuf::from("/"), PathBuf::from);
        let (controller, node) = (root.join("usr/sbin/slurmctld"), root.join("usr/sbin/slurmd"));
        let wlm = |program: &Path| {
            let renamed = program.with_file_name(format!("{}-wlm", program.file_name()?.to_str()?));
            [renamed, program.to_owned()].into_iter().find(|path| path.is_file())
        };
        let (Some(controller), Some(node)) = (wlm(&controller), wlm(&node)) else {
            crate::not_checked("no Slurm is installed");
            return Ok(None);
        };
        let libraries = root.join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH));
        let folder = tempfile::tempdir()?;
        let plugins = libraries.join("slurm-wlm");
        let name = fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned();
        fs::write(folder.path().join("slurm.conf"), configuration(folder.path(), &name, &plugins)?)?;
        for name in ["state", "spool"] {
            fs::create_dir(folder.path().join(name))?;
        }
        let conf = folder.path().join("slurm.conf").to_string_lossy().into_owned();
        let mut environment = vec![search_path(&[root.join("usr/bin"), root.join("usr/sbin")])];
        environment.push(("SLURM_CONF".to_owned(), conf));
        let mut options = vec!["-N".to_owned(), name];
        if root != Path::new("/") {
            let paths = format!("{}:{}", libraries.display(), plugins.display());
            environment.push(("LD_LIBRARY_PATH".to_owned(), paths));
            // Unpacked programs look for this one at a fixed path.
            options.extend(["-d".to_owned(), node.to_string_lossy().replace("/slurmd", "/slurmstepd")]);
        }
        let Some(mut cluster) = Self::behind(folder, environment)? else { return Ok(None) };
        for (program, options) in [(&controller, &[][..]), (&node, &options[..])] {
            cluster.start(program, options)?;
        }
        cluster.wait_for_the_node()?;
        Ok(Some(cluster))
    }

    fn start(&mut self, program: &Path, options: &[String]) -> Result<()> {
        let log = File::create(self.folder.path().join(format!("{}.out", self.daemons.len())))?;
        let mut command = Command::new(program);
        command.arg("-D").args(options).envs(self.environment.iter().cloned()).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        self.daemons.push(command.spawn().with_context(|| program.display().to_string())?);
        Ok(())
    }

    fn behind(folder: TempDir, environment: Vec<(String, String)>) -> Result<Option<Self>> {
        let words: Vec<String> = environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let config = format!("SetEnv HOME={{folder}}/home {}", words.join(" "));
        let Some(sshd) = Sshd::start_with(&config)? else { return Ok(None) };
        let at = |name: &str| folder.path().join(name);
        let endpoint = sshd.endpoint();
        fs::write(at("known_hosts"), format!("[{}]:{} {}\n", endpoint.host, endpoint.port, sshd.host_key().as_str()))?;
        let alias = format!(
            "Host cluster\n  HostName {}\n  Port {}\n  User {}\n  IdentityFile {}\n  IdentitiesOnly yes\n\
             UserKnownHostsFile {}\n",
            endpoint.host,
            endpoint.port,
            endpoint.user,
            sshd.key().private_path().display(),
            at("known_hosts").display(),
        );
        fs::write(at("ssh_config"), alias)?;
        Ok(Some(Self { sshd, folder, daemons: Vec::new(), environment }))
    }

    fn wait_for_the_node(&self) -> Result<()> {
        let until = Instant::now() + COMES_UP;
        while Instant::now() < until {
            if self.says("sinfo", &["-h", "-o", "%t"]).trim() == "idle" {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        let log = |n: usize| fs::read_to_string(self.folder.path().join(format!("{n}.out"))).unwrap_or_default();
        bail!("Slurm does not come up: {} {}", log(0), log(1))
    }

    /// Output of a Slurm command.
    pub fn says(&self, command: &str, arguments: &[&str]) -> String {
        let path = self.environment.iter().find(|(name, _)| name == "PATH").map(|(_, path)| path.clone());
        let path = path.unwrap_or_default();
        let mut programs = std::env::split_paths(&path).map(|folder| folder.join(command));
        let program = programs.find(|program| program.is_file()).unwrap_or_else(|| command.into());
        let out = Command::new(program).args(arguments).envs(self.environment.iter().cloned()).output();
        out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
    }

    /// Settings for this cluster, with a short polling interval.
    pub fn settings(&self) -> String {
        let config = self.ssh_config();
        format!("[brokers.slurm]\nhost = \"cluster\"\nssh-config = {config:?}\nlisting-interval = \"1s\"\n")
    }

    /// The SSH configuration with the alias `cluster`.
    pub fn ssh_config(&self) -> PathBuf {
        self.folder.path().join("ssh_config")
    }

    /// Replaces the output of one of the fake's commands from now on.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn prints(&self, command: &str, text: &str) -> Result<()> {
        let (program, said) = (self.folder.path().join("bin").join(command), self.folder.path().join("said"));
        fs::write(&said, text)?;
        fs::remove_file(&program)?;
        fs::write(&program, format!("#!/bin/sh\ncat '{}'\n", said.display()))?;
        Ok(fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?)
    }

    /// Forgets the login node's host key.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn forget_host_key(&self) -> Result<()> {
        Ok(fs::write(self.folder.path().join("known_hosts"), "")?)
    }

    /// Cuts the fake's nodes off from the network from now on, except those of the partition
    /// `net`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn cut_off(&self) -> Result<()> {
        let curl = self.folder.path().join("bin/curl");
        let script = "#!/bin/sh\n[ \"${SLURM_JOB_PARTITION:-}\" = net ] || exit 7\nPATH=${PATH#*:} exec curl \"$@\"\n";
        fs::write(&curl, script)?;
        Ok(fs::set_permissions(&curl, fs::Permissions::from_mode(0o755))?)
    }

    /// Injects the fake's next fault.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn inject_failure(&self, how: &str, words: &str) -> Result<()> {
        Ok(fs::write(self.folder.path().join(how), words)?)
    }

    /// Removes the fault.
    pub fn clear_failure(&self, how: &str) {
        // The fault may have been consumed.
        let _ = fs::remove_file(self.folder.path().join(how));
    }

    /// Jobs of the fake.
    pub fn jobs(&self) -> usize {
        fs::read_dir(self.folder.path().join("jobs")).map_or(0, Iterator::count)
    }

    /// Most jobs that waited or ran at the same time.
    pub fn most_jobs(&self) -> usize {
        let live = fs::read_to_string(self.folder.path().join("live")).unwrap_or_default();
        live.lines().filter_map(|line| line.trim().parse().ok()).max().unwrap_or(0)
    }

    /// Names of all jobs that were submitted to the fake.
    pub fn job_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path().join("jobs")).into_iter().flatten().flatten();
        let name = |job: fs::DirEntry| fs::read_to_string(job.path().join("name")).unwrap_or_default();
        entries.map(|job| name(job).trim().to_owned()).collect()
    }

    /// Number of the fake's calls that begin with `command`.
    pub fn asked(&self, what: &str) -> usize {
        let asked = fs::read_to_string(self.folder.path().join("asked")).unwrap_or_default();
        asked.lines().filter(|line| line.starts_with(what)).count()
    }

    /// Leases that are left on the shared file system.
    pub fn leases(&self) -> PathBuf {
        self.sshd.home().join("outliers-jobs")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            // A destructor cannot report errors.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn search_path(first: &[PathBuf]) -> (String, String) {
    let rest = std::env::var_os("PATH").unwrap_or_default();
    let all = first.iter().cloned().chain(std::env::split_paths(&rest));
    let joined = std::env::join_paths(all).unwrap_or_default();
    ("PATH".to_owned(), joined.to_string_lossy().into_owned())
}

/// One node in two partitions, no munge, ports that are free.
fn configuration(folder: &Path, name: &str, plugins: &Path) -> Result<String> {
    let port = || -> Result<u16> { Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port()) };
    let me = Command::new("id").arg("-un").output().context("id -un")?;
    let me = String::from_utf8(me.stdout)?.trim().to_owned();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (folder, plugins, controller, node) = (folder.display(), plugins.display(), port()?, port()?);
    Ok(format!(
        "ClusterName=test\nSlurmctldHost={name}(127.0.0.1)\nSlurmUser={me}\nSlurmdUser={me}\n\
         AuthType=auth/none\nAuthInfo=cred_expire=5\nCredType=cred/none\nPluginDir={plugins}\n\
         SlurmctldPort={controller}\nSlurmdPort={node}\n\
         StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\n\
         SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\n\
         ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nSwitchType=switch/none\nMpiDefault=none\n\
         ReturnToService=2\nOverTimeLimit=0\nKillWait=5\nSelectType=select/cons_tres\nSelectTypeParameters=CR_Core\n\
         JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\nJobRequeue=1\n\
         NodeName={name} NodeAddr=127.0.0.1 CPUs={processors} RealMemory=2000 State=UNKNOWN\n\
         PartitionName=cpu Nodes={name} Default=YES MaxTime=1-00:00:00 State=UP\n\
         PartitionName=net Nodes={name} MaxTime=1-00:00:00 State=UP\n"
    ))
}
