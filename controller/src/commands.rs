//! One file per command: each takes what was decided and says how the program ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::broker::local::{self, LocalBroker};
use crate::broker::{Broker, GpuRequest, Offer};
use crate::cli::{Cli, Command, WantArgs};
use crate::deploy::{Patience, Ports, SshHosts};
use crate::ledger::Ledger;
use crate::local_worker::LocalWorker;
use crate::market;
use crate::report::{Complaint, ExitStatus, Reporter};
use crate::run::{Trouble, TroubleKind};
use crate::secret::Secret;
use crate::settings::{Environment, Settings};
use crate::units::{Bytes, UsdPerHour};

pub mod analyze;
pub mod completions;
pub mod demo;
pub mod deploy;
pub mod inspect;
pub mod instances;
pub mod job;
pub mod plan;
pub mod runs;

/// Version of the documents printed with `--json`.
pub const SCHEMA: u32 = 1;

/// The brokers that are built in.
const BROKERS: [&str; 1] = [local::NAME];

/// What every command has at hand.
pub struct Context {
    /// What was decided.
    pub settings: Settings,
    /// Who tells.
    pub reporter: Reporter,
    /// The folder the command runs in.
    pub here: PathBuf,
    /// This program.
    pub exe: PathBuf,
}

/// Does what was typed.
pub async fn run(cli: Cli) -> ExitStatus {
    let environment = Environment::of_process();
    let reporter = Reporter::new(&cli.global, &environment);
    // An instance has no home, no state and no settings of ours: a folder is all it knows.
    if let Command::InstanceServe { folder } = &cli.command {
        return serve(folder).await;
    }
    match dispatch(cli, &environment, reporter).await {
        Ok(status) => status,
        Err((reporter, complaint)) => {
            reporter.complaint(&complaint);
            complaint.status
        }
    }
}

async fn dispatch(
    cli: Cli,
    environment: &Environment,
    reporter: Reporter,
) -> Result<ExitStatus, (Reporter, Complaint)> {
    let (settings, here, exe) = match surroundings(&cli, environment) {
        Ok(known) => known,
        Err(complaint) => return Err((reporter, complaint)),
    };
    let context = Context { settings, reporter, here, exe };
    let done = match cli.command {
        Command::Deploy(args) => deploy::command(&context, &args).await,
        Command::Demo(args) => demo::command(&context, &args).await,
        Command::Runs(command) => runs::command(&context, command).await,
        Command::Instances(command) => instances::command(&context, command).await,
        Command::Analyze(args) => analyze::command(&context, &args).await,
        Command::Inspect(args) => inspect::command(&context, &args).await,
        Command::Plan(args) => plan::command(&context, &args).await,
        Command::Completions { shell } => Ok(completions::command(shell)),
        Command::InstanceServe { folder } => Ok(serve(&folder).await),
    };
    done.map_err(|complaint| (context.reporter, complaint))
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

/// The settings, the current folder and this program.
fn surroundings(cli: &Cli, environment: &Environment) -> Result<(Settings, PathBuf, PathBuf), Complaint> {
    let lost = |what: &str, error: &std::io::Error| Complaint::failed(format!("{what}: {error}"));
    let here = std::env::current_dir().map_err(|error| lost("the current folder", &error))?;
    let exe = std::env::current_exe().map_err(|error| lost("this program's path", &error))?;
    let settings = Settings::resolve(cli.global.config.as_deref(), environment, &here)?;
    Ok((settings, here, exe))
}

impl Context {
    /// The ledger.
    ///
    /// # Errors
    /// What the ledger says.
    pub fn ledger(&self) -> Result<Ledger, Complaint> {
        Ok(Ledger::open(&self.settings.state)?)
    }

    /// The worker program beside this one.
    ///
    /// # Errors
    /// It is missing, or of another version.
    pub async fn worker(&self) -> Result<LocalWorker, Complaint> {
        Ok(LocalWorker::find(self.settings.worker.as_deref(), &self.exe).await?)
    }

    /// A cloud by its name, else the default one.
    ///
    /// # Errors
    /// There is none of that name; the hint lists those there are.
    pub fn cloud(&self, name: Option<&str>) -> Result<Cloud, Complaint> {
        let name = name.unwrap_or_else(|| self.settings.broker.name());
        if name != local::NAME {
            let hint = format!("built in: {}", BROKERS.join(", "));
            return Err(Complaint::refused(format!("there is no broker `{name}`"), hint));
        }
        let broker = LocalBroker::new(self.settings.state.join("local"), self.exe.clone());
        Ok(Cloud { broker: Arc::new(broker), patience: Patience::LOCAL, is_local: true })
    }

    /// The way to rented hosts, to which `worker` is pushed.
    pub fn hosts(&self, worker: &Path) -> SshHosts {
        SshHosts::new(worker.to_owned(), self.settings.push_limit)
    }
}

/// A cloud and how it is dealt with.
#[derive(Clone)]
pub struct Cloud {
    /// The cloud.
    pub broker: Arc<dyn Broker>,
    /// How long things take there.
    pub patience: Patience,
    /// It is this machine: nothing costs real money, and paths are the same there.
    pub is_local: bool,
}

impl Cloud {
    /// What a run needs.
    pub fn ports<'a>(&'a self, hosts: &'a SshHosts, secrets: &'a [(&'static str, Secret)]) -> Ports<'a> {
        Ports { broker: &*self.broker, select, hosts, secrets }
    }
}

fn select(offers: Vec<Offer>, want: &GpuRequest) -> Result<Vec<Offer>, Trouble> {
    let selected = market::select(offers, want).map(|selection| selection.offers);
    selected.map_err(|none| Trouble { kind: TroubleKind::NoOffer, message: none.to_string(), hint: None })
}

/// What is wanted of an instance.
pub fn request(want: &WantArgs) -> GpuRequest {
    let gib = |gib: f64| Bytes((gib * (1u64 << 30) as f64) as u64);
    GpuRequest {
        gpu_count: want.gpu_count,
        gpu_filter: want.gpu_filter.clone(),
        min_vram: want.min_vram.map(gib),
        min_cpu_ram: want.min_cpu_ram.map(gib),
        min_disk: None,
        max_price: want.max_price.map(UsdPerHour::from_dollars),
        ..GpuRequest::default()
    }
}
