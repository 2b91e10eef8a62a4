//! The command line and its help. This module makes no decisions.

use std::path::PathBuf;
use std::sync::LazyLock;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use outliers_protocol::headings::{MODEL, OUTPUT};
use outliers_protocol::{JobOptions, SCHEMA, ThresholdOptions, whole};

use crate::cloud::offer::GpuRequest;
use crate::cloud::offer::request::{MONEY, RENT};
use crate::units::{PlotWidth, Positive, Span};

pub(crate) mod settings;

/// Headings of options, beside those of the job's and the instance's.
const ALL: &str = "Options of all commands";
const CLUSTER: &str = "With --broker slurm";

/// How outlier features survive in mixture-of-experts models: rents an instance, runs the worker
/// on it, fetches the results and ends the rental.
///
/// Example: outliers deploy --model allenai/OLMoE-1B-7B-0125
#[derive(Parser, Debug)]
#[command(name = "outliers", version = VERSION.as_str(), max_term_width = 110, after_help = EXIT_CODES, infer_subcommands = true)]
pub struct Cli {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
    /// Options of all commands.
    #[command(flatten)]
    pub global: Global,
}

/// Version of the program, the commit that it was built from, and version of the documents.
pub static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("{} (commit {}, schema {SCHEMA})", env!("CARGO_PKG_VERSION"), env!("OUTLIERS_COMMIT")));

const EXIT_CODES: &str = "\
Exit codes:
  0    done, and no instance is left, except with --keep-running or --detach
  1    the run failed, or something on this machine
  2    wrong arguments, or refused before anything was rented
  3    no offer matched, or none could be had
  4    the time limit or the budget was reached
  5    a cloud, its key, or an instance failed
  6    an instance may still be running; the command to mend it is printed last
  130  interrupted or cancelled; the instance was ended";

/// Options of every command.
#[derive(Args, Clone, Debug, Default)]
pub struct Global {
    /// Print one JSON document on standard output instead of tables.
    #[arg(long, global = true, help_heading = ALL)]
    pub json: bool,
    /// When to use colours.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN", help_heading = ALL)]
    pub color: Color,
    /// Print errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = ALL)]
    pub quiet: bool,
    /// Print everything, the worker's log included.
    #[arg(short, long, global = true, help_heading = ALL)]
    pub verbose: bool,
    /// Show each request to a cloud and its reply, without keys.
    #[arg(long, global = true, help_heading = ALL)]
    pub explain: bool,
    /// Settings [default: ~/.config/outliers/outliers.toml].
    #[arg(long, global = true, value_name = "FILE", help_heading = ALL)]
    pub config: Option<PathBuf>,
    /// With --broker slurm.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Options of a Slurm cluster, in addition to `[brokers.slurm]` of the settings.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = CLUSTER)]
pub struct ClusterArgs {
    /// The login node: user@name, or an alias of ~/.ssh/config.
    #[arg(long, global = true, value_name = "HOST")]
    pub host: Option<String>,
    /// The only partition to use.
    #[arg(long, global = true, value_name = "NAME")]
    pub partition: Option<String>,
    /// The account that is charged.
    #[arg(long, global = true, value_name = "NAME")]
    pub account: Option<String>,
    /// The quality of service.
    #[arg(long, global = true, value_name = "NAME")]
    pub qos: Option<String>,
    /// Features that a node must have.
    #[arg(long, global = true, value_name = "LIST")]
    pub constraint: Option<String>,
    /// A partition whose nodes reach the hub: a job there fetches each model first.
    #[arg(long, global = true, value_name = "NAME")]
    pub stage_partition: Option<String>,
}

/// Colour mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Rent an instance, run a job on it, fetch the results and end the rental.
    ///
    /// Example: outliers deploy --model allenai/OLMoE-1B-7B-0125 --gpu-filter A100 --max-price 2.50
    ///
    /// If it is interrupted by a crash, the same command picks the run up where it is. Under
    /// `nohup` it outlives its terminal. Without it, a terminal that closes (SIGHUP) lets go of a
    /// run whose worker is at work, for `outliers attach`, where the instance ends by itself at
    /// its deadline; any other run is ended as by SIGTERM.
    Deploy(Box<DeployArgs>),
    /// Take up a run whose controller went away: follow its worker, fetch the results and end the
    /// rental.
    ///
    /// Example: outliers attach last
    Attach {
        /// Prefix of the run's id, or `last` [default: the only run that no process drives].
        run: Option<String>,
        /// Save the results in this folder instead, also while another process drives the run: for
        /// a run whose results cannot be saved.
        #[arg(long, value_name = "DIR")]
        results: Option<PathBuf>,
    },
    /// Run many models over one text, several at a time. A file lists them; each is deployed as by
    /// `deploy`.
    ///
    /// Example: outliers survey config/surveys/moe-nine.toml --dry-run
    ///
    /// All models are checked before the first instance is rented. The same command continues a
    /// survey: complete models are not run again, abandoned runs are taken up, failed ones wait
    /// for --rerun-failed.
    Survey(Box<SurveyArgs>),
    /// Show running runs with place, price and deadline, finished runs, and money spent.
    ///
    /// Example: outliers status
    Status {
        /// Refresh until nothing runs any more; Ctrl-C quits.
        #[arg(long)]
        watch: bool,
    },
    /// Write the status of all runs, with the next commands, to handoffs/<date>.md, from the
    /// ledger and the results.
    ///
    /// Example: outliers handoff
    Handoff {
        /// Folder for the document [default: handoffs].
        #[arg(short, long, value_name = "DIR")]
        output: Option<PathBuf>,
        /// Replace today's document even if it was edited.
        #[arg(long)]
        force: bool,
    },
    /// Make a small model with planted outlier features, deploy it on this machine, and compare
    /// what is found.
    ///
    /// Example: outliers demo
    Demo(DemoArgs),
    /// Show runs, or cancel one.
    ///
    /// Example: outliers runs show last
    #[command(subcommand)]
    Runs(RunsCommand),
    /// Show results, open their page, or count with other shares of layers and positions.
    ///
    /// Example: outliers results show last
    #[command(subcommand)]
    Results(ResultsCommand),
    /// Show instances, or end one.
    ///
    /// Example: outliers instances list
    #[command(subcommand)]
    Instances(InstancesCommand),
    /// Run the worker on this machine, without any instance.
    ///
    /// Example: outliers analyze --model ./my-checkpoint --num-sequences 4
    Analyze(Box<AnalyzeArgs>),
    /// Describe a checkpoint: layers, sites, tensors, bytes. Reads headers only.
    ///
    /// Example: outliers inspect --model allenai/OLMoE-1B-7B-0125
    Inspect(Box<InspectArgs>),
    /// Estimate the memory, time and cost of a run. Rents nothing.
    ///
    /// Example: outliers plan --model allenai/OLMoE-1B-7B-0125 --price 1.64 --tflops 312
    Plan(Box<PlanArgs>),
    /// List the offers of all clouds, sorted by the cost of a run.
    ///
    /// Example: outliers offers --gpu-filter H100 --max-price 4 --model allenai/OLMoE-1B-7B-0125
    Offers(Box<OffersArgs>),
    /// Compare results: every way of counting, with confidence intervals, and published figures.
    ///
    /// Example: outliers compare remote_results --html report.html
    Compare(CompareArgs),
    /// Convert the predecessor's files to a result that can be compared.
    ///
    /// Example: outliers import results/olmoe_20251024_163000
    Import(ImportArgs),
    /// Check keys, clouds, clocks, SSH, the ledger, and whether an instance was left behind.
    ///
    /// Example: outliers doctor
    Doctor(DoctorArgs),
    /// End instances whose deadline has passed, from the clouds' lists alone: for a timer, or a
    /// machine without the ledger.
    ///
    /// Example: outliers reap --owner k3tpf36v --dry-run
    ///
    /// Runs of this machine's ledger end as runs do, results first. An owner is the second part of
    /// an instance's name.
    Reap(ReapArgs),
    /// Build the worker that instances get.
    ///
    /// Example: outliers worker build --cuda
    #[command(subcommand)]
    Worker(WorkerCommand),
    /// Print a completion script for a shell.
    ///
    /// Example: outliers completions bash > ~/.local/share/bash-completion/completions/outliers
    Completions {
        /// Name of the shell.
        shell: clap_complete::Shell,
    },
    /// Write a manual page per command to a folder.
    ///
    /// Example: outliers man ~/.local/share/man/man1
    Man {
        /// The folder.
        folder: PathBuf,
    },
    /// Serve as an instance of the local broker.
    #[command(hide = true)]
    InstanceServe {
        /// The instance's folder.
        folder: PathBuf,
    },
}

impl Command {
    /// Whether the command only lists or ends instances. Such a command must not depend on
    /// settings that do not concern clouds.
    pub fn only_ends(&self) -> bool {
        matches!(self, Self::Instances(_) | Self::Reap(_) | Self::Runs(RunsCommand::Cancel { .. }))
    }
}

/// Commands for the worker program.
#[derive(Subcommand, Debug)]
pub enum WorkerCommand {
    /// Build a worker for other machines, from the project's folder. It needs glibc 2.28 or newer.
    ///
    /// Example: outliers worker build --cuda
    ///
    /// Needs Rust and Python 3 with pip, which brings the linker and the CUDA compiler; nothing is
    /// installed. The first build compiles everything anew.
    Build {
        /// Support NVIDIA GPUs.
        #[arg(long)]
        cuda: bool,
        /// Output path [default: beside this program, where deploy and survey find it].
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

/// The checkpoint.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Hub id (owner/name), or a folder with config.json and safetensors files.
    #[arg(long, value_name = "ID|FOLDER", help_heading = MODEL)]
    pub model: String,
    /// Branch, tag or commit of a hub model.
    #[arg(long, default_value = "main", help_heading = MODEL)]
    pub revision: String,
}

/// The instance.
#[derive(Args, Clone, Debug, Default)]
pub struct WantArgs {
    /// Where to rent, separated by commas [default: every cloud whose key is set; this machine
    /// (`local`) if none is].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = RENT)]
    pub broker: Vec<String>,
    /// Filters for offers.
    #[command(flatten)]
    pub request: GpuRequest,
}

/// Arguments of `deploy`.
#[derive(Args, Clone, Debug)]
pub struct DeployArgs {
    /// The checkpoint.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text and how it is run.
    #[command(flatten)]
    pub job: JobOptions,
    /// The instance.
    #[command(flatten)]
    pub want: WantArgs,
    /// Upload the model's folder. Without it, a folder is expected to be on the instance; on the
    /// local broker it is, at the same path.
    #[arg(long, help_heading = MODEL)]
    pub push_model: bool,
    /// Keep the instance when the worker has ended. It bills on until `outliers instances
    /// terminate`, at most for --max-duration.
    #[arg(long, help_heading = MONEY)]
    pub keep_running: bool,
    /// Return as soon as the worker runs. Its instance bills on, until `outliers attach` has
    /// fetched the results, at most until its deadline: then its guard or its cloud ends it, and
    /// results that were not fetched are lost. Clouds without either are refused.
    #[arg(long, help_heading = MONEY)]
    pub detach: bool,
    /// Time limit of the instance: 90s, 45m, 6h [default: settings].
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, help_heading = MONEY)]
    pub max_duration: Option<Span>,
    /// Rent even if the run is estimated to exceed its time limit; partial results are fetched
    /// then.
    #[arg(long, help_heading = MONEY)]
    pub allow_cut_short: bool,
    /// Budget of this run in USD: nothing is rented that could exceed it by its time limit.
    #[arg(long, value_name = "USD", allow_negative_numbers = true, help_heading = MONEY)]
    pub budget: Option<Positive>,
    /// Maximum GPU-hours of this run: nothing is rented that could exceed them
    /// by its time limit. Time in a queue does not count.
    #[arg(long, value_name = "HOURS", allow_negative_numbers = true, help_heading = MONEY)]
    pub max_gpu_hours: Option<Positive>,
    /// Show the plan, the offer and its cost; rent nothing.
    #[arg(long, help_heading = MONEY)]
    pub dry_run: bool,
    /// Do not ask for confirmation.
    #[arg(short, long, help_heading = MONEY)]
    pub yes: bool,
}

/// Arguments of `survey`.
#[derive(Args, Clone, Debug)]
pub struct SurveyArgs {
    /// The survey's file (TOML): its name, its models, the text. See config/surveys.
    pub file: PathBuf,
    /// Only these models, by id or by their names in the survey, separated by commas.
    #[arg(long, value_name = "MODELS", value_delimiter = ',', help_heading = MODEL)]
    pub only: Vec<String>,
    /// Maximum number of instances at the same time [default: the file's, else settings].
    #[arg(long, value_name = "N", value_parser = at_least_one, allow_negative_numbers = true, help_heading = RENT)]
    pub max_parallel: Option<u16>,
    /// Options of all instances; they override the file's.
    #[command(flatten)]
    pub want: WantArgs,
    /// Upload models that are folders. Without it, they are expected to be on the instance; on the
    /// local broker they are.
    #[arg(long, help_heading = MODEL)]
    pub push_model: bool,
    /// Time limit of each instance: 90s, 45m, 6h [default: the file's, else settings].
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, help_heading = MONEY)]
    pub max_duration: Option<Span>,
    /// Rent even if the run is estimated to exceed its time limit; partial results are fetched
    /// then.
    #[arg(long, help_heading = MONEY)]
    pub allow_cut_short: bool,
    /// Budget of all runs of the survey in USD, earlier ones included: nothing is rented that could
    /// exceed it by the time limits [default: the file's].
    #[arg(long, value_name = "USD", allow_negative_numbers = true, help_heading = MONEY)]
    pub budget: Option<Positive>,
    /// Maximum GPU-hours of all runs of the survey. Time in a queue does not count [default: the
    /// file's].
    #[arg(long, value_name = "HOURS", allow_negative_numbers = true, help_heading = MONEY)]
    pub max_gpu_hours: Option<Positive>,
    /// Run failed models again.
    #[arg(long, help_heading = MONEY)]
    pub rerun_failed: bool,
    /// Show what each model would rent, take and cost; rent nothing.
    #[arg(long, help_heading = MONEY)]
    pub dry_run: bool,
    /// Do not ask for confirmation.
    #[arg(short, long, help_heading = MONEY)]
    pub yes: bool,
}

/// Arguments of `demo`.
#[derive(Args, Clone, Debug, Default)]
pub struct DemoArgs {
    /// Keep the model here [default: below demo/ in the state folder].
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Subcommands of `runs`.
#[derive(Subcommand, Debug)]
pub enum RunsCommand {
    /// All runs, oldest first.
    ///
    /// Example: outliers runs list
    List,
    /// Show one run: its job, its history, its cost.
    ///
    /// Example: outliers runs show last
    Show {
        /// Prefix of the run's id, or `last`.
        run: String,
    },
    /// Show the worker's log: what was fetched and, while no process drives the run, what the
    /// instance has.
    ///
    /// Example: outliers runs logs last -f
    ///
    /// It only reads: the instance's guard does not take it for a controller.
    Logs {
        /// Prefix of the run's id, or `last`.
        run: String,
        /// Follow until the worker has ended.
        #[arg(short, long)]
        follow: bool,
    },
    /// Stop a run: fetch the results so far and end its instance.
    ///
    /// Example: outliers runs cancel last
    Cancel {
        /// Prefix of the run's id, or `last`.
        run: String,
    },
}

/// Subcommands of `results`.
#[derive(Subcommand, Debug)]
pub enum ResultsCommand {
    /// All results below the results' folder, with their counts.
    ///
    /// Example: outliers results list
    List,
    /// The tables of one result.
    ///
    /// Example: outliers results show last
    Show {
        /// The beginning of its run's id, its folder, or `last`: the one written last.
        run: String,
    },
    /// Open the page of one result in a browser. The page is written to the result's folder.
    ///
    /// Example: outliers results open last
    Open {
        /// The beginning of its run's id, its folder, or `last`: the one written last.
        run: String,
    },
    /// Apply other shares of layers and positions to the stored counts. Runs and writes nothing.
    ///
    /// Example: outliers results recount last --layer-fraction 0.5
    Recount {
        /// The beginning of its run's id, its folder, or `last`: the one written last.
        run: String,
        /// The shares; default: those of the run. A --threshold other than the run's is refused,
        /// since the counts for it are not stored.
        #[command(flatten)]
        thresholds: ThresholdOptions,
    },
}

/// Clouds to query.
#[derive(Args, Clone, Debug, Default)]
pub struct BrokerFilter {
    /// Only these brokers, separated by commas [default: this machine, every cloud whose key is
    /// set, and the clusters that the settings or open runs name].
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub broker: Vec<String>,
}

/// Subcommands of `instances`.
#[derive(Subcommand, Debug)]
pub enum InstancesCommand {
    /// List all instances of all clouds with a key, with their runs and states.
    ///
    /// Example: outliers instances list
    List {
        /// Where to look.
        #[command(flatten)]
        only: BrokerFilter,
    },
    /// Show one instance with the data of its cloud and of the ledger.
    ///
    /// Example: outliers instances show i-4f2a
    Show {
        /// Its id, as `instances list` shows it, or the beginning of it.
        id: String,
        /// Where to look.
        #[command(flatten)]
        only: BrokerFilter,
    },
    /// Print the command that opens a shell on an instance of this ledger, or run it.
    ///
    /// Example: outliers instances ssh i-4f2a --run
    Ssh {
        /// Its id, as `instances list` shows it, or the beginning of it.
        id: String,
        /// Run it.
        #[arg(long)]
        run: bool,
        /// Where to look.
        #[command(flatten)]
        only: BrokerFilter,
    },
    /// End instances, held ones and strays included. Instances of other owners need --owner or
    /// --force.
    ///
    /// Example: outliers instances terminate --all
    ///
    /// Shows the instances with models and prices, and asks for confirmation. If standard input is
    /// not a terminal, --yes is required. On the local broker, which costs nothing, it does not
    /// ask.
    ///
    /// Works without the ledger, and without a list if one broker is named. Instances that another
    /// or a lost ledger rented need --owner.
    Terminate(TerminateArgs),
}

/// Arguments of `instances terminate`.
#[derive(Args, Clone, Debug, Default)]
pub struct TerminateArgs {
    /// Ids as shown by `instances list`.
    #[arg(required_unless_present = "all")]
    pub ids: Vec<String>,
    /// All instances of this ledger, or of --owner.
    #[arg(long, conflicts_with = "ids")]
    pub all: bool,
    /// Where to look.
    #[command(flatten)]
    pub only: BrokerFilter,
    /// Whose instances are meant: the second part of their names [default: those of this machine's
    /// ledger].
    #[arg(long, value_name = "OWNER", value_parser = NonEmptyStringValueParser::new())]
    pub owner: Option<String>,
    /// Instances of any owner.
    #[arg(long, conflicts_with_all = ["all", "owner"])]
    pub force: bool,
    /// Do not ask for confirmation.
    #[arg(short, long)]
    pub yes: bool,
}

/// Arguments of `doctor`.
#[derive(Args, Clone, Debug, Default)]
pub struct DoctorArgs {
    /// Where to look.
    #[command(flatten)]
    pub only: BrokerFilter,
    /// First make a damaged ledger anew, of what is left of it, the results and the clouds' lists.
    /// The damaged file is kept.
    #[arg(long)]
    pub repair: bool,
}

/// Arguments of `reap`.
#[derive(Args, Clone, Debug, Default)]
pub struct ReapArgs {
    /// Where to look.
    #[command(flatten)]
    pub only: BrokerFilter,
    /// Show overdue instances, end none.
    #[arg(long)]
    pub dry_run: bool,
    /// Whose instances [default: those of this machine's ledger].
    #[arg(long, value_name = "OWNER", conflicts_with = "all_owners", value_parser = NonEmptyStringValueParser::new())]
    pub owner: Option<String>,
    /// Instances of all owners in these accounts. Asks twice.
    #[arg(long)]
    pub all_owners: bool,
    /// Do not ask for confirmation; give it twice with --all-owners.
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub yes: u8,
}

/// Arguments of `analyze`.
#[derive(Args, Clone, Debug)]
pub struct AnalyzeArgs {
    /// The checkpoint.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text and how it is run.
    #[command(flatten)]
    pub job: JobOptions,
    /// Folder for the results, new or empty [default: <model>-<id> in the results' folder]. Until
    /// they are complete they are in DIR.partial, where the same command resumes.
    #[arg(short, long, value_name = "DIR", help_heading = OUTPUT)]
    pub output: Option<PathBuf>,
}

/// Arguments of `compare`.
#[derive(Args, Clone, Debug)]
pub struct CompareArgs {
    /// Folders of results, or folders of such folders [default: the results' folder, without
    /// what is partial].
    #[arg(value_name = "DIR")]
    pub folders: Vec<PathBuf>,
    /// What to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: CompareFormat,
    /// Also write a self-contained HTML page with plots.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Also write every plot to this folder, as SVG.
    #[arg(long, value_name = "DIR")]
    pub svg: Option<PathBuf>,
    /// Also write every plot to this folder, as PNG.
    #[arg(long, value_name = "DIR")]
    pub png: Option<PathBuf>,
    /// Also write every plot to this folder, as PDF with vector shapes.
    #[arg(long, value_name = "DIR")]
    pub pdf: Option<PathBuf>,
    /// Width of the plots on paper, as in 84mm or 3.3in [default: 840 pixels].
    #[arg(long, value_name = "WIDTH", allow_hyphen_values = true)]
    pub size: Option<PlotWidth>,
    /// Pixels per inch of PNG, with --size [default: 300].
    #[arg(long, value_name = "N", value_parser = dpi, allow_negative_numbers = true, requires = "size")]
    pub dpi: Option<u16>,
    /// Only these results, by number, name or folder, separated by commas. Their numbers do not
    /// change.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Continue without the figures of partial or damaged results, and list them.
    #[arg(long)]
    pub allow_partial: bool,
}

/// Output formats of `compare`.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum CompareFormat {
    /// Tables for a terminal.
    #[default]
    Table,
    /// Markdown tables.
    Markdown,
    /// One line per figure.
    Csv,
    /// Everything, as JSON.
    Json,
}

/// Arguments of `import`.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    /// The predecessor's final_analysis_results.json, perplexity_results.json, or folders with
    /// them, of one model.
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// Folder for the result [default: below the results' folder].
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// Arguments of `offers`.
#[derive(Args, Clone, Debug)]
pub struct OffersArgs {
    /// The instance.
    #[command(flatten)]
    pub want: WantArgs,
    /// Rank by the cost of a run of this checkpoint: hub id or folder [default: of a run with 100
    /// GiB of weights].
    #[arg(long, value_name = "ID|FOLDER", help_heading = MODEL)]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub model.
    #[arg(long, default_value = "main", requires = "model", help_heading = MODEL)]
    pub revision: String,
    /// Show all, not only the best 20.
    #[arg(long, help_heading = OUTPUT)]
    pub all: bool,
}

/// Arguments of `inspect`.
#[derive(Args, Clone, Debug)]
pub struct InspectArgs {
    /// The checkpoint.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text and how it is run.
    #[command(flatten)]
    pub job: JobOptions,
}

/// Arguments of `plan`.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// The checkpoint.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text and how it is run.
    #[command(flatten)]
    pub job: JobOptions,
    /// The instance.
    #[command(flatten)]
    pub want: WantArgs,
    /// Price of the whole instance, in USD per hour [default: the cheapest matching offer's].
    #[arg(long, value_name = "USD", allow_negative_numbers = true, help_heading = MONEY)]
    pub price: Option<Positive>,
    /// Rate at which the instance reads weights, in GiB/s [default: settings].
    #[arg(long, value_name = "GIB", allow_negative_numbers = true, help_heading = MONEY)]
    pub bandwidth: Option<Positive>,
    /// Peak arithmetic of the instance, in 10^12 operations per second; without it, only reading
    /// is timed.
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = MONEY)]
    pub tflops: Option<Positive>,
}

/// Parses a number of concurrent runs.
fn at_least_one(text: &str) -> Result<u16, String> {
    match whole::<u16>(text)? {
        0 => Err("it must be positive".to_owned()),
        count => Ok(count),
    }
}

/// Parses a resolution.
fn dpi(text: &str) -> Result<u16, String> {
    let dpi: u16 = whole(text)?;
    if (36..=2400).contains(&dpi) { Ok(dpi) } else { Err("it must be between 36 and 2400".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use outliers_protocol::headings::{COMPUTE, MEASURE, TEXT};

    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_and_readme_list_the_same_exit_codes() {
        assert!(include_str!("../../README.md").contains(&format!("\n{EXIT_CODES}\n")));
        assert!(EXIT_CODES.contains("4    the time limit or the budget"));
    }

    /// The examples of a command and its subcommands. Every visible command must have one.
    fn examples(command: &clap::Command, called: &str) -> Vec<String> {
        let help = command.get_long_about().map(ToString::to_string).unwrap_or_default();
        let of_this = help.lines().filter_map(|line| line.strip_prefix("Example: ")).map(str::to_owned);
        let mut examples: Vec<String> = of_this.collect();
        assert!(examples.iter().any(|example| example.starts_with(called)), "{called} has no example");
        for below in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            examples.extend(self::examples(below, &format!("{called} {}", below.get_name())));
        }
        examples
    }

    #[test]
    fn every_command_has_a_valid_example() {
        let examples = examples(&Cli::command(), "outliers");
        assert!(examples.len() > 30, "{examples:?}");
        for example in examples {
            let typed = example.split_whitespace().take_while(|word| !word.starts_with('>'));
            assert!(Cli::try_parse_from(typed).is_ok(), "{example}");
        }
    }

    #[test]
    fn options_are_grouped_under_headings() {
        let cli = Cli::command();
        for name in ["deploy", "survey", "plan", "offers", "analyze", "inspect"] {
            let command = cli.find_subcommand(name).unwrap();
            for option in command.get_arguments().filter(|argument| !argument.is_positional()) {
                assert!(option.get_help_heading().is_some_and(|heading| heading != ALL), "{name} {option}");
            }
        }
        let apart = |argument: &clap::Arg| matches!(argument.get_help_heading(), Some(ALL | CLUSTER));
        assert!(cli.get_arguments().all(apart));
        let help = Cli::try_parse_from(["outliers", "deploy", "--help"]).unwrap_err().to_string();
        for heading in [MODEL, TEXT, MEASURE, COMPUTE, RENT, MONEY, OUTPUT, CLUSTER, ALL] {
            assert!(help.contains(&format!("\n{heading}:\n")), "{heading}");
        }
    }

    #[test]
    fn negative_number_is_a_wrong_value_and_not_an_option() {
        let deploy = ["--model", "a/b"];
        for (command, before, option, said) in [
            ("deploy", &deploy[..], "--max-price", "must be a positive number"),
            ("deploy", &deploy, "--budget", "must be a positive number"),
            ("deploy", &deploy, "--min-vram", "must be positive"),
            ("deploy", &deploy, "--threshold", "must be a positive number"),
            ("deploy", &deploy, "--layer-fraction", "must be a positive number up to 1"),
            ("analyze", &deploy, "--position-fraction", "must be a positive number up to 1"),
            ("deploy", &deploy, "--gpu-count", "must be positive"),
            ("deploy", &deploy, "--num-sequences", "must be positive"),
            ("deploy", &deploy, "--sequence-length", "must be positive"),
            ("deploy", &deploy, "--max-duration", "must be positive"),
            ("plan", &deploy, "--tflops", "must be a positive number"),
            ("plan", &deploy, "--bandwidth", "must be a positive number"),
            ("survey", &["s.toml"], "--max-parallel", "must be positive"),
            ("compare", &["--size", "84mm"], "--dpi", "must be positive"),
        ] {
            let typed = ["outliers", command].into_iter().chain(before.iter().copied()).chain([option, "-1"]);
            let error = Cli::try_parse_from(typed).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains(option), "{error}");
        }
        for typed in [
            &["deploy", "--model", "a/b", "--stream-budget", "-4GB"][..],
            &["deploy", "--model", "a/b", "--max-duration", "-5m"],
            &["compare", "--size", "-84mm"],
            &["survey", "s.toml", "--max-parallel", "0"],
        ] {
            let error = Cli::try_parse_from([&["outliers"][..], typed].concat()).unwrap_err().to_string();
            assert!(error.contains("must be positive"), "{error}");
        }
    }

    #[test]
    fn implausible_numbers_are_refused() {
        let deploy = ["--max-price", "--budget", "--max-gpu-hours", "--min-vram", "--max-duration"];
        let deploy = deploy.map(|option| ("deploy", option));
        let plan = ["--price", "--bandwidth", "--tflops", "--max-price"].map(|option| ("plan", option));
        for (command, option) in deploy.into_iter().chain(plan) {
            for text in ["-1", "nan", "inf", "cheap", "1e99", "0"] {
                let typed = ["outliers", command, "--model", "a/b", &format!("{option}={text}")];
                let none_is_fine = option == "--min-vram" && text == "0";
                assert_eq!(Cli::try_parse_from(typed).is_err(), !none_is_fine, "{option} {text}");
            }
        }
    }
}
