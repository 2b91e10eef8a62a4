//! Resolves the requests of commands from the command line, survey files and settings, in this
//! order of priority.

use std::path::{Path, PathBuf};
use std::time::Duration;

use outliers_protocol::{JobOptions, Merge};

use super::Settings;
use crate::cli::{DeployArgs, ModelArgs, OffersArgs, PlanArgs, SurveyArgs};
use crate::cloud::broker::GpuRequest;
use crate::run::Membership;
use crate::survey::{Survey, SurveyError, SurveyModel};
use crate::units::{Bytes, GpuTime, Positive, Span, Usd, UsdPerHour};

/// A requested job, not yet checked.
#[derive(Clone, Debug)]
pub(crate) struct JobRequest {
    /// The checkpoint: hub id or folder.
    pub(crate) model: String,
    /// Branch, tag or commit of a hub model.
    pub(crate) revision: String,
    /// Options merged from all sources.
    pub(crate) options: JobOptions,
    /// The folder that relative paths refer to.
    pub(crate) here: PathBuf,
}

/// Options for renting and for the end of the instance.
#[derive(Clone, Debug)]
pub(crate) struct RunTerms {
    /// Filters for offers. Missing ones come from the plan.
    pub(crate) request: GpuRequest,
    pub(crate) push_model: bool,
    pub(crate) keep_running: bool,
    /// Whether to leave the instance to its guard once the worker runs.
    pub(crate) detach: bool,
    /// Time limit from the create call to the instance's end.
    pub(crate) max_duration: Duration,
    /// Whether a run may start although it is estimated to exceed the time limit.
    pub(crate) cut_short: bool,
    /// Budget of this run, or of the whole survey.
    pub(crate) budget: Option<Usd>,
    /// Budget of GPU time of this run, or of the whole survey.
    pub(crate) max_gpu_time: Option<GpuTime>,
    /// Folder in which the results' folder is created.
    pub(crate) results: PathBuf,
    pub(crate) survey: Option<Membership>,
}

#[derive(Clone, Debug)]
pub(crate) struct DeployRequest {
    pub(crate) job: JobRequest,
    /// Brokers to rent from; empty: those of the settings.
    pub(crate) brokers: Vec<String>,
    pub(crate) terms: RunTerms,
    pub(crate) dry_run: bool,
    pub(crate) yes: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct SurveyRequest {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    pub(crate) folder: PathBuf,
    /// Only these models, by id or by their names; empty: all.
    pub(crate) only: Vec<String>,
    /// Brokers to rent from; empty: those of the settings.
    pub(crate) brokers: Vec<String>,
    /// Models in the file's order.
    pub(crate) models: Vec<ModelRequest>,
    pub(crate) max_parallel: usize,
    /// Budget of all runs together.
    pub(crate) budget: Option<Usd>,
    /// Budget of GPU time of all runs together.
    pub(crate) max_gpu_time: Option<GpuTime>,
    pub(crate) rerun_failed: bool,
    pub(crate) dry_run: bool,
    pub(crate) yes: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct ModelRequest {
    pub(crate) name: String,
    pub(crate) job: JobRequest,
    pub(crate) terms: RunTerms,
}

#[derive(Clone, Debug)]
pub(crate) struct PlanRequest {
    pub(crate) job: JobRequest,
    /// Brokers to query; empty: those of the settings.
    pub(crate) brokers: Vec<String>,
    pub(crate) request: GpuRequest,
    /// Price of the whole instance; `None`: that of the cheapest matching offer.
    pub(crate) price: Option<UsdPerHour>,
    /// Bytes of weights that the instance reads per second.
    pub(crate) read_rate: Bytes,
    /// Peak arithmetic of the instance, operations per second.
    pub(crate) peak: Option<f64>,
}

#[derive(Clone, Debug)]
pub(crate) struct OffersRequest {
    /// The job whose cost determines the ranking.
    pub(crate) job: Option<JobRequest>,
    /// Brokers to query; empty: those of the settings.
    pub(crate) brokers: Vec<String>,
    pub(crate) request: GpuRequest,
    pub(crate) all: bool,
}

fn dollars(amount: Positive) -> Usd {
    Usd::from_dollars(amount.get())
}

fn gpu_hours(hours: Positive) -> GpuTime {
    GpuTime::from_hours(hours.get())
}

impl Settings {
    /// The job of a command that runs in the folder `here`.
    pub(crate) fn job_request(&self, model: ModelArgs, typed: JobOptions, here: &Path) -> JobRequest {
        let ModelArgs { model, revision } = model;
        JobRequest { model, revision, options: typed.merge(self.job.clone()), here: here.to_owned() }
    }

    pub(crate) fn deploy_request(&self, typed: DeployArgs, here: &Path) -> DeployRequest {
        DeployRequest {
            job: self.job_request(typed.model, typed.job, here),
            brokers: typed.want.broker,
            terms: RunTerms {
                request: typed.want.request,
                push_model: typed.push_model,
                keep_running: typed.keep_running,
                detach: typed.detach,
                max_duration: self.time_limit(typed.max_duration),
                cut_short: typed.allow_cut_short,
                budget: typed.budget.map(dollars),
                max_gpu_time: typed.max_gpu_hours.map(gpu_hours),
                results: self.results.clone(),
                survey: None,
            },
            dry_run: typed.dry_run,
            yes: typed.yes,
        }
    }

    /// Resolves `survey`, run in the folder `here`. Paths in its file are relative to the file's
    /// folder.
    ///
    /// # Errors
    /// The file cannot be read, or is invalid.
    pub(crate) fn survey_request(&self, typed: SurveyArgs, here: &Path) -> Result<SurveyRequest, SurveyError> {
        let Survey { name, path, job, models, max_parallel, budget, max_gpu_time, max_duration } =
            Survey::read(&here.join(typed.file))?;
        let options = job.merge(self.job.clone());
        let beside = path.parent().unwrap_or(Path::new(".")).to_owned();
        let folder = self.results.join(&name);
        let budget = typed.budget.map(dollars).or(budget);
        let max_gpu_time = typed.max_gpu_hours.map(gpu_hours).or(max_gpu_time);
        let model = |model: SurveyModel| ModelRequest {
            terms: RunTerms {
                request: typed.want.request.clone().merge(model.request),
                push_model: typed.push_model,
                keep_running: false,
                detach: false,
                max_duration: self.time_limit(typed.max_duration.or(model.max_duration).or(max_duration)),
                cut_short: typed.allow_cut_short,
                budget,
                max_gpu_time,
                results: folder.clone(),
                survey: Some(Membership { survey: name.clone(), model: model.name.clone() }),
            },
            job: JobRequest {
                model: model.id,
                revision: model.revision,
                options: options.clone(),
                here: beside.clone(),
            },
            name: model.name,
        };
        let models = models.into_iter().map(model).collect();
        Ok(SurveyRequest {
            file: path,
            only: typed.only,
            brokers: typed.want.broker,
            models,
            max_parallel: typed.max_parallel.map(usize::from).or(max_parallel).unwrap_or(self.max_parallel),
            budget,
            max_gpu_time,
            rerun_failed: typed.rerun_failed,
            dry_run: typed.dry_run,
            yes: typed.yes,
            name,
            folder,
        })
    }

    pub(crate) fn plan_request(&self, typed: PlanArgs, here: &Path) -> PlanRequest {
        let bytes = |gib: Positive| Bytes((gib.get() * (1u64 << 30) as f64) as u64);
        PlanRequest {
            job: self.job_request(typed.model, typed.job, here),
            brokers: typed.want.broker,
            request: typed.want.request,
            price: typed.price.map(|usd| UsdPerHour(dollars(usd))),
            read_rate: typed.bandwidth.map_or(self.read_rate, bytes),
            peak: typed.tflops.map(|tera| tera.get() * 1e12),
        }
    }

    pub(crate) fn offers_request(&self, typed: OffersArgs, here: &Path) -> OffersRequest {
        let revision = typed.revision;
        let job = |model| self.job_request(ModelArgs { model, revision }, JobOptions::default(), here);
        OffersRequest {
            job: typed.model.map(job),
            brokers: typed.want.broker,
            request: typed.want.request,
            all: typed.all,
        }
    }

    fn time_limit(&self, given: Option<Span>) -> Duration {
        given.map_or(self.max_duration, |span| span.0)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use outliers_protocol::Thresholds;

    use super::*;
    use crate::cli::settings::Environment;
    use crate::cli::{Cli, Command};

    fn settings(folder: &Path) -> Settings {
        let file = folder.join("settings.toml");
        let text = "[run]\nmax-duration = '4h'\n[survey]\nmax-parallel = 7\n\
                    [thresholds]\nmagnitude = 5\nlayer-fraction = 0.5";
        std::fs::write(&file, text).unwrap();
        Settings::resolve(Some(file.as_path()), &Environment::of(&[("HOME", "/home/me")]), folder).unwrap()
    }

    fn typed(arguments: &[&str]) -> Command {
        Cli::try_parse_from([&["outliers"][..], arguments].concat()).unwrap().command
    }

    #[test]
    fn cli_wins_over_model_then_survey_then_settings() {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path());
        let text = "name = 's'\nlayers = 2\nmax-duration = '3h'\nbudget = 9\nmodels = ['a/b']\n\
                    [thresholds]\nlayer-fraction = 0.25\n\
                    [[model]]\nid = 'c/d'\nmax-duration = '2h'\nmin-vram = 80\nregion = 'eu'";
        std::fs::write(folder.path().join("s.toml"), text).unwrap();
        let asked = |more: &[&str]| {
            let Command::Survey(args) = typed(&[&["survey", "s.toml"][..], more].concat()) else { panic!() };
            settings.survey_request(*args, folder.path()).unwrap()
        };
        let hours = |asked: &SurveyRequest| -> Vec<u64> {
            asked.models.iter().map(|model| model.terms.max_duration.as_secs() / 3600).collect()
        };
        let file = asked(&[]);
        assert_eq!((hours(&file), file.max_parallel, file.budget), (vec![3, 2], 7, Some(Usd::from_dollars(9.0))));
        let job = &file.models[1].job;
        assert_eq!((job.model.as_str(), job.options.layers, job.here.as_path()), ("c/d", Some(2), folder.path()));
        let thresholds = job.options.thresholds.over(Thresholds::default());
        assert_eq!(thresholds, Thresholds { magnitude: 5.0, layer_fraction: 0.25, position_fraction: 0.06 });
        let both = asked(&["--max-duration=1h", "--budget=3", "--min-vram=24", "--max-parallel=2"]);
        assert_eq!((hours(&both), both.max_parallel, both.budget), (vec![1, 1], 2, Some(Usd::from_dollars(3.0))));
        let request = &both.models[1].terms.request;
        assert_eq!((request.min_vram, request.region.as_deref()), (Some(Bytes::from_gib(24)), Some("eu")));
        let none = &file.models[0].terms;
        assert_eq!((&none.request, none.results.as_path()), (&GpuRequest::default(), file.folder.as_path()));
    }

    #[test]
    fn commands_use_cli_values_or_else_settings() {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path());
        let Command::Deploy(args) = typed(&["deploy", "--model=a/b", "--threshold=8", "--budget=2"]) else { panic!() };
        let asked = settings.deploy_request(*args, folder.path());
        assert_eq!((asked.terms.max_duration.as_secs(), asked.terms.budget), (14_400, Some(Usd::from_dollars(2.0))));
        let thresholds = asked.job.options.thresholds.over(Thresholds::default());
        assert_eq!((thresholds.magnitude, thresholds.layer_fraction), (8.0, 0.5));
        let Command::Plan(args) = typed(&["plan", "--model=a/b", "--bandwidth=2", "--price=1.5"]) else { panic!() };
        let asked = settings.plan_request(*args, folder.path());
        assert_eq!((asked.read_rate, asked.price), (Bytes::from_gib(2), Some(UsdPerHour::from_dollars(1.5))));
        let Command::Offers(args) = typed(&["offers", "--gpu-count=2"]) else { panic!() };
        let asked = settings.offers_request(*args, folder.path());
        assert!(asked.job.is_none() && asked.request.gpu_count == Some(2));
    }
}
