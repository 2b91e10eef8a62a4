//! The commands, one file each. Each takes resolved values and returns the exit status.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outliers_protocol::PlanFigures;

use crate::cli::settings::{CloudSettings, DefaultBroker, Environment, Settings, known_brokers};
use crate::cli::{AnalyzeArgs, Cli, Command};
use crate::cloud::broker::local::{self, LocalBroker};
use crate::cloud::broker::slurm::{self, Slurm};
use crate::cloud::broker::{ApiAccess, Offer};
use crate::cloud::clouds::{BadHosts, Cloud, Clouds, Timeouts};
use crate::cloud::estimate::Work;
use crate::cloud::http::{Explain, Http, HttpLimits};
use crate::host;
use crate::host::transport::program::OpenSsh;
use crate::run::deploy::{Ports, SshHosts};
use crate::run::ledger::{Ledger, RunRecord};
use crate::run::local_worker::LocalWorker;
use crate::secret::Secret;
use crate::ui::report::{CliError, ExitStatus, Reporter};
use crate::units::Bytes;

pub(crate) mod analyze;
pub(crate) mod attach;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod demo;
pub(crate) mod deploy;
pub(crate) mod doctor;
mod drive;
pub(crate) mod handoff;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod instances;
pub(crate) mod job;
pub(crate) mod man;
pub(crate) mod offers;
pub(crate) mod plan;
mod prepare;
pub(crate) mod reap;
pub(crate) mod results;
pub(crate) mod runs;
pub(crate) mod status;
pub(crate) mod survey;
pub(crate) mod worker;

/// Version of the documents printed with `--json`.
pub(crate) const SCHEMA: u32 = 1;

pub(crate) struct Context {
    pub(crate) settings: Settings,
    pub(crate) reporter: Reporter,
    /// The current folder.
    pub(crate) here: PathBuf,
    /// Path of this program.
    pub(crate) exe: PathBuf,
    /// Whether requests and replies of clouds are shown.
    pub(crate) explain: bool,
}

/// This machine's ledger, as far as it can be read.
pub(crate) struct Home {
    /// The ledger; `None` if it cannot be read.
    pub(crate) ledger: Option<Ledger>,
    /// Owner in the names of this machine's instances.
    pub(crate) owner: Option<String>,
}

pub(crate) async fn run(cli: Cli) -> ExitStatus {
    let environment = Environment::of_process();
    let reporter = Reporter::new(&cli.global, &environment);
    // An instance has no home folder, state or settings of the user, only its folder.
    if let Command::InstanceServe { folder } = &cli.command {
        return serve(folder).await;
    }
    match dispatch(cli, &environment, reporter).await {
        Ok(status) => status,
        Err((reporter, cli_error)) => {
            reporter.cli_error(&cli_error);
            cli_error.status
        }
    }
}

async fn dispatch(cli: Cli, environment: &Environment, reporter: Reporter) -> Result<ExitStatus, (Reporter, CliError)> {
    let (settings, here, exe) = match surroundings(&cli, environment, &reporter) {
        Ok(known) => known,
        Err(cli_error) => return Err((reporter, cli_error)),
    };
    let context = Context { settings, reporter, here, exe, explain: cli.global.explain };
    // Arguments and settings are resolved here. Commands get the result.
    let (settings, here) = (&context.settings, context.here.as_path());
    let done = match cli.command {
        Command::Deploy(args) => deploy::command(&context, &settings.deploy_request(*args, here)).await,
        Command::Attach { run, results } => attach::command(&context, run.as_deref(), results.as_deref()).await,
        Command::Survey(args) => match settings.survey_request(*args, here) {
            Ok(asked) => survey::command(&context, &asked).await,
            Err(error) => Err(error.into()),
        },
        Command::Status { watch } => status::command(&context, watch).await,
        Command::Handoff { output, force } => handoff::command(&context, output.as_deref(), force),
        Command::Demo(args) => demo::command(&context, &args).await,
        Command::Runs(command) => runs::command(&context, command).await,
        Command::Results(command) => results::command(&context, &command),
        Command::Instances(command) => instances::command(&context, command).await,
        Command::Analyze(args) => {
            let AnalyzeArgs { model, job, output } = *args;
            analyze::command(&context, &settings.job_request(model, job, here), output.as_deref()).await
        }
        Command::Inspect(args) => inspect::command(&context, &settings.job_request(args.model, args.job, here)).await,
        Command::Plan(args) => plan::command(&context, &settings.plan_request(*args, here)).await,
        Command::Offers(args) => offers::command(&context, &settings.offers_request(*args, here)).await,
        Command::Compare(args) => compare::command(&context, &args),
        Command::Import(args) => import::command(&context, &args),
        Command::Doctor(args) => doctor::command(&context, &args).await,
        Command::Reap(args) => reap::command(&context, &args).await,
        Command::Worker(command) => worker::command(&context, command).await,
        Command::Completions { shell } => Ok(completions::command(shell)),
        Command::Man { folder } => man::command(&context, &folder),
        Command::InstanceServe { folder } => Ok(serve(&folder).await),
    };
    let done = done.and_then(|status| match context.reporter.unprinted() {
        Some(cli_error) if status == ExitStatus::Done => Err(cli_error),
        _ => Ok(status),
    });
    done.map_err(|cli_error| (context.reporter, cli_error))
}

async fn serve(folder: &Path) -> ExitStatus {
    match local::serve(folder).await {
        Ok(()) => ExitStatus::Done,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitStatus::Failed
        }
    }
}

/// The settings, the current folder and the path of this program.
fn surroundings(
    cli: &Cli,
    environment: &Environment,
    reporter: &Reporter,
) -> Result<(Settings, PathBuf, PathBuf), CliError> {
    let lost = |what: &str, error: &std::io::Error| CliError::failed(format!("{what}: {error}"));
    let here = std::env::current_dir().map_err(|error| lost("the current folder", &error))?;
    let exe = std::env::current_exe().map_err(|error| lost("this program's path", &error))?;
    let config = cli.global.config.as_deref();
    let settings = match Settings::resolve(config, environment, &here) {
        Err(error) if cli.command.only_ends() => {
            reporter.sentence(&error.into());
            Settings::for_endings(config, environment, &here)?
        }
        settings => settings?,
    };
    Ok((settings.on_cluster(&cli.global.cluster), here, exe))
}

impl Context {
    pub(crate) fn ledger(&self) -> Result<Ledger, CliError> {
        Ok(Ledger::open(&self.settings.state)?)
    }

    /// Opens the ledger. If it cannot be read, reports that; then tags and the clouds' lists must
    /// suffice.
    pub(crate) fn home(&self) -> Home {
        let read = Ledger::open(&self.settings.state).and_then(|ledger| Ok((ledger.records()?, ledger)));
        match read {
            Ok((records, ledger)) => {
                self.reporter.unreadable(&records.unreadable);
                Home { owner: Some(ledger.owner().to_owned()), ledger: Some(ledger) }
            }
            Err(error) => {
                self.reporter.sentence(&error.into());
                Home { owner: Ledger::owner_beside(&self.settings.state), ledger: None }
            }
        }
    }

    /// Finds the worker program beside this one.
    ///
    /// # Errors
    /// It is missing, or of another version.
    pub(crate) async fn worker(&self) -> Result<LocalWorker, CliError> {
        let worker = LocalWorker::find(self.settings.worker.as_deref(), &self.exe).await?;
        Ok(worker.limited(self.settings.inspect_limits))
    }

    /// Data and operations of a run, with the settings' assumptions.
    pub(crate) fn work(&self, plan: &PlanFigures) -> Work {
        Work {
            read: Bytes(plan.bytes_to_read),
            operations: plan.flops,
            read_rate: self.settings.read_rate,
            efficiency: self.settings.efficiency,
            on_gpus: plan.on_gpus,
        }
    }

    /// The clouds with these names; those of the settings if there are none.
    ///
    /// # Errors
    /// No cloud has that name, or its key is not set.
    pub(crate) fn clouds(&self, names: &[String]) -> Result<Clouds, CliError> {
        let default = match &self.settings.broker {
            DefaultBroker::Named(name) => vec![name.clone()],
            DefaultBroker::Local => vec![local::NAME.to_owned()],
            DefaultBroker::Clouds => self.with_key().map(|cloud| cloud.kind.name.to_owned()).collect(),
        };
        let names = if names.is_empty() { &default } else { names };
        let clouds: Result<Vec<Cloud>, CliError> = names.iter().map(|name| self.cloud(name)).collect();
        Ok(clouds?.into())
    }

    /// Clouds by their names, else every one that can be asked, since a forgotten instance may be
    /// on any of them: this machine, those whose key is set, and the clusters that the settings or
    /// the ledger's open runs name.
    ///
    /// # Errors
    /// There is none of that name, its key is not set, or its settings make no sense.
    pub(crate) fn clouds_to_list(&self, ledger: Option<&Ledger>, names: &[String]) -> Result<Clouds, CliError> {
        let is_named = |name: &str| names.is_empty() || names.iter().any(|named| named == name);
        let clusters = if is_named(slurm::NAME) { self.clusters(ledger)? } else { Vec::new() };
        let all = std::iter::once(local::NAME).chain(self.with_key().map(|cloud| cloud.kind.name));
        let names: Vec<String> = if names.is_empty() { all.map(str::to_owned).collect() } else { names.to_vec() };
        let others = names.iter().filter(|name| *name != slurm::NAME || clusters.is_empty());
        let mut clouds = others.map(|name| self.cloud(name)).collect::<Result<Vec<Cloud>, CliError>>()?;
        clouds.extend(clusters);
        Ok(clouds.into())
    }

    /// The cluster of the settings, and those on which open runs of the ledger have jobs, by name.
    ///
    /// # Errors
    /// One cannot be spoken to, or a run does not tell its own.
    pub(crate) fn clusters(&self, ledger: Option<&Ledger>) -> Result<Vec<Cloud>, CliError> {
        // With another scratch folder than that of the settings, where the record of a run has one.
        let mut hosts: BTreeSet<(String, Option<String>)> =
            self.settings.slurm.iter().map(|site| (site.host.clone(), None)).collect();
        let usual = self.settings.any_cluster.scratch.clone().unwrap_or_default();
        let runs = ledger.map_or_else(|| Ok(Vec::new()), Ledger::runs)?;
        for run in &runs {
            let Some(offer) = run.state.offer().filter(|offer| offer.broker == slurm::NAME) else { continue };
            if let Some(host) = slurm::login_node(offer) {
                hosts.insert((host, slurm::scratch(offer).filter(|scratch| *scratch != usual)));
            } else if self.settings.slurm.is_none() {
                let message = format!("run {} has a job on a cluster, and its login node is not recorded", run.id);
                return Err(CliError::refused(message, "name it with --host"));
            }
        }
        hosts.into_iter().map(|(host, scratch)| self.cluster(&host, scratch)).collect()
    }

    /// The cloud of an offer: where its instance is, if it has one.
    ///
    /// # Errors
    /// As [`Self::cloud`].
    pub(crate) fn cloud_of(&self, offer: &Offer) -> Result<Cloud, CliError> {
        let at = |host: String| self.cluster(&host, slurm::scratch(offer));
        slurm::login_node(offer).map_or_else(|| self.cloud(&offer.broker), at)
    }

    /// The clouds of a run: that of its instance, and those on which it may rent another.
    ///
    /// # Errors
    /// As [`Self::cloud`].
    pub(crate) fn clouds_of(&self, run: &RunRecord) -> Result<Clouds, CliError> {
        let cloud = |name: &String| match run.state.offer().filter(|offer| offer.broker == *name) {
            Some(offer) => self.cloud_of(offer),
            None => self.cloud(name),
        };
        let clouds: Result<Vec<Cloud>, CliError> = run.spec.broker_names().iter().map(cloud).collect();
        Ok(clouds?.into())
    }

    /// The clouds with which a run that was left goes on: `clouds`, unless its instance is on a
    /// cluster that its record names otherwise.
    ///
    /// # Errors
    /// As [`Self::cloud`].
    pub(crate) fn clouds_to_go_on(&self, run: &RunRecord, clouds: &Clouds) -> Result<Clouds, CliError> {
        match run.state.offer() {
            Some(offer) if clouds.of(offer).is_none() => self.clouds_of(run),
            _ => Ok(clouds.clone()),
        }
    }

    fn with_key(&self) -> impl Iterator<Item = &CloudSettings> {
        self.settings.clouds.iter().filter(|cloud| cloud.key.is_some())
    }

    /// The cloud with this name.
    ///
    /// # Errors
    /// No cloud has that name, or its key is not set.
    pub(crate) fn cloud(&self, name: &str) -> Result<Cloud, CliError> {
        if name == local::NAME {
            let broker = LocalBroker::new(self.settings.state.join("local"), self.exe.clone());
            return Ok(Cloud { broker: Arc::new(broker), timeouts: Timeouts::LOCAL, is_local: true });
        }
        if name == slurm::NAME {
            let Some(site) = &self.settings.slurm else {
                let hint = "say --host me@login.cluster.edu, or set `host` in [brokers.slurm] of the settings";
                return Err(CliError::refused("slurm needs a login node", hint));
            };
            return self.cluster(&site.host, None);
        }
        let Some(cloud) = self.settings.clouds.iter().find(|cloud| cloud.kind.name == name) else {
            let hint = format!("built in: {}", known_brokers());
            return Err(CliError::refused(format!("there is no broker `{name}`"), hint));
        };
        let Some(key) = &cloud.key else {
            let hint = format!("set {} to a key from {}", cloud.variable(), cloud.kind.key_page);
            return Err(CliError::refused(format!("{name} needs a key"), hint));
        };
        let http = Http::new(cloud.kind.name, &cloud.base_url, Some(key.clone()), HttpLimits::default())?;
        let access = ApiAccess {
            http: http.explained(self.explain()),
            image: cloud.image.clone(),
            ssh_user: cloud.ssh_user.clone(),
            ssh_port: cloud.ssh_port,
        };
        let broker = Arc::from((cloud.kind.connect)(access));
        let listing_interval = cloud.listing_interval.unwrap_or(Timeouts::CLOUD.listing_interval);
        Ok(Cloud { broker, timeouts: Timeouts { listing_interval, ..Timeouts::CLOUD }, is_local: false })
    }

    /// The cluster behind this login node, with the recorded scratch folder or the settings' one.
    fn cluster(&self, host: &str, scratch: Option<String>) -> Result<Cloud, CliError> {
        let site = &self.settings.any_cluster;
        let ssh = OpenSsh::new(host, site.ssh_config.as_deref(), &self.settings.state.join("slurm"));
        let ssh = ssh.map_err(|error| CliError::refused(error.message, "name a host, or another state folder"))?;
        // A job is listed as soon as it exists.
        let timeouts =
            Timeouts { listing_interval: site.listing_interval, queue: site.queue, absences: 2, ..Timeouts::CLOUD };
        let token = self.settings.hf_token.clone();
        let site = slurm::Site { host: host.to_owned(), token, ..site.clone() };
        let site = match scratch {
            Some(recorded) => site.with_scratch(recorded),
            None => site,
        };
        let is_that_of_settings = self.settings.slurm.as_ref().is_none_or(|named| named.host == host);
        let broker = Slurm::new(site, ssh, host::PROBE, self.explain()).taking_nameless(is_that_of_settings);
        Ok(Cloud { broker: Arc::new(broker), timeouts, is_local: false })
    }

    fn explain(&self) -> Option<Explain> {
        // Standard error may be closed, which must not end the command.
        self.explain.then(|| -> Explain { Arc::new(|words| drop(writeln!(std::io::stderr().lock(), "{words}"))) })
    }

    /// Access to rented hosts, to which the worker for instances is pushed.
    pub(crate) fn hosts_for(&self, worker: &LocalWorker) -> SshHosts {
        let pushed = &worker.pushed().path;
        let uses_gpus = worker.pushed().cuda.is_some();
        if worker.pushes_an_older_one() {
            let (old, new) = (pushed.display(), worker.path().display());
            self.reporter.say(&format!("{old} is older than {new}: `outliers worker build` makes it anew"));
        }
        self.hosts(pushed).using_gpus(uses_gpus)
    }

    /// Access to rented hosts, to which `worker` is pushed.
    pub(crate) fn hosts(&self, worker: &Path) -> SshHosts {
        SshHosts::new(worker.to_owned(), self.settings.push_limit, self.settings.save_point_limit)
    }
}

/// External dependencies of a run.
pub(crate) fn ports<'a>(
    clouds: &'a Clouds,
    bad_hosts: &'a BadHosts,
    hosts: &'a SshHosts,
    secrets: &'a [(&'static str, Secret)],
) -> Ports<'a> {
    Ports { clouds, bad_hosts, hosts, secrets, start_throttle: None }
}
