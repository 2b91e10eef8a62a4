//! The request for an instance, from the command line or a survey file. The ledger stores it.
//!
//! A new filter is a field of [`GpuRequest`] (its docstring is the help text), and a rule in
//! [`crate::cloud::market`].

use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Args, Command, FromArgMatches, Id};
use outliers_protocol::{Positive, mergeable, whole};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};

use super::Tier;
use crate::units::{Bytes, CudaVersion, UsdPerHour};

/// Heading of options: where to rent.
pub const RENT: &str = "Where to rent";
/// Heading of options: what it may cost and take.
pub const MONEY: &str = "Money and time";

/// Bytes of a GiB.
const GIB: f64 = (1u64 << 30) as f64;

mergeable! {
    /// Filters for offers. Zero or `None`: no restriction.
    #[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, rename_all = "kebab-case")]
    pub struct GpuRequest {
        /// Number of GPUs; 0: CPU only is enough [default: 1 on a cloud, those present on this
        /// machine].
        #[arg(long, value_name = "N", value_parser = whole::<u32>, allow_negative_numbers = true, help_heading = RENT)]
        #[serde(alias = "gpu_count")]
        pub gpu_count: Option<u32>,
        /// Part of the GPU's name, as in A100 or H100.
        #[arg(long, value_name = "TEXT", help_heading = RENT)]
        #[serde(alias = "gpu_filter")]
        pub gpu_filter: Option<String>,
        /// Minimum memory of each GPU, in GiB.
        #[arg(long, value_name = "GIB", value_parser = gib, allow_negative_numbers = true, help_heading = RENT)]
        #[serde(alias = "min_vram", with = "in_gib")]
        pub min_vram: Option<Bytes>,
        /// Minimum memory of the host, in GiB.
        #[arg(long, value_name = "GIB", value_parser = gib, allow_negative_numbers = true, help_heading = RENT)]
        #[serde(alias = "min_cpu_ram", with = "in_gib")]
        pub min_cpu_ram: Option<Bytes>,
        /// Minimum disk, in GiB; never less than the checkpoint needs.
        #[arg(long, value_name = "GIB", value_parser = gib, allow_negative_numbers = true, help_heading = RENT)]
        #[serde(alias = "min_disk", with = "in_gib")]
        pub min_disk: Option<Bytes>,
        /// Maximum price of the whole instance (not of one GPU) with its disk, in USD per hour.
        #[arg(long, value_name = "USD", value_parser = price, allow_negative_numbers = true, help_heading = MONEY)]
        #[serde(alias = "max_price", with = "in_usd")]
        pub max_price: Option<UsdPerHour>,
        /// Part of the region's or country's name.
        #[arg(long, value_name = "TEXT", help_heading = RENT)]
        pub region: Option<String>,
        /// Also rent preemptible instances: cheaper, but a run may have to begin again.
        #[arg(long, help_heading = RENT)]
        pub spot: bool,
        /// Only from hosts of this kind.
        #[command(flatten)]
        pub tier: Option<Tier>,
        /// Minimum CUDA version of the host's driver, such as 12.4.
        #[arg(long, value_name = "VERSION", allow_negative_numbers = true, help_heading = RENT)]
        #[serde(alias = "min_cuda")]
        pub min_cuda: Option<CudaVersion>,
        /// Minimum CUDA version of the worker. Offers without the figure are rented, and checked
        /// before the worker is pushed.
        #[arg(skip)]
        #[serde(alias = "worker_cuda")]
        pub worker_cuda: Option<CudaVersion>,
        /// What the worker itself needs of the host's memory on GPUs, by its plan. Offers that do
        /// not tell are rented, as above.
        #[arg(skip)]
        pub worker_ram: Option<Bytes>,
    }
}

/// `--secure`, `--community`.
impl Args for Tier {
    fn group_id() -> Option<Id> {
        Some(Id::from("tier"))
    }

    fn augment_args(command: Command) -> Command {
        let flag = |name: &'static str, help: &'static str| {
            Arg::new(name).long(name).action(ArgAction::SetTrue).help(help).help_heading(RENT)
        };
        command
            .arg(flag("secure", "Only offers of data centres"))
            .arg(flag("community", "Only offers of private hosts"))
            .group(ArgGroup::new("tier").args(["secure", "community"]))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Tier {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(if matches.get_flag("secure") { Self::Secure } else { Self::Community })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Parses a lower limit of memory or disk. Zero passes everything.
fn gib(text: &str) -> Result<Bytes, String> {
    text.parse::<f64>().map_err(|_| "it must be a number".to_owned()).and_then(bytes)
}

fn bytes(gib: f64) -> Result<Bytes, String> {
    match gib {
        gib if (0.0..=1e9).contains(&gib) => Ok(Bytes((gib * GIB).round() as u64)),
        gib if gib < 0.0 => Err("it must be positive".to_owned()),
        _ => Err("it must be between 0 and 1000000000".to_owned()),
    }
}

fn price(text: &str) -> Result<UsdPerHour, String> {
    text.parse::<Positive>().and_then(per_hour)
}

/// A price is at least the smallest amount that is counted.
fn per_hour(usd: Positive) -> Result<UsdPerHour, String> {
    let price = UsdPerHour::from_dollars(usd.get());
    if price.0.micros() > 0 { Ok(price) } else { Err("it must be a positive number from 0.000001 on".to_owned()) }
}

/// Serialises memory as a number of GiB.
mod in_gib {
    use super::*;

    pub(super) fn serialize<S: Serializer>(size: &Option<Bytes>, serializer: S) -> Result<S::Ok, S::Error> {
        size.map(Bytes::gib).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Bytes>, D::Error> {
        let gib = Option::<f64>::deserialize(deserializer)?;
        gib.map(bytes).transpose().map_err(de::Error::custom)
    }
}

/// Serialises a price as USD per hour.
mod in_usd {
    use super::*;

    pub(super) fn serialize<S: Serializer>(price: &Option<UsdPerHour>, serializer: S) -> Result<S::Ok, S::Error> {
        price.map(|price| price.0.dollars()).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<UsdPerHour>, D::Error> {
        let usd = Option::<Positive>::deserialize(deserializer)?;
        usd.map(per_hour).transpose().map_err(de::Error::custom)
    }
}

/// Reads a request from the ledger. Earlier versions wrote bytes and millionths of a dollar, under
/// keys with `_`.
///
/// # Errors
/// The text is not a request.
pub fn recorded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<GpuRequest, D::Error> {
    let mut record = Map::<String, Value>::deserialize(deserializer)?;
    if record.contains_key("gpu_count") {
        for (key, unit) in [("min_vram", GIB), ("min_cpu_ram", GIB), ("min_disk", GIB), ("max_price", 1e6)] {
            if let Some(number) = record.get_mut(key)
                && let Some(count) = number.as_f64()
            {
                *number = Value::from(count / unit);
            }
        }
    }
    serde_json::from_value(Value::Object(record)).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use outliers_protocol::Merge;
    use serde_json::json;

    use super::*;

    #[derive(Deserialize)]
    struct Spec {
        #[serde(deserialize_with = "recorded")]
        request: GpuRequest,
    }

    #[derive(Debug, Parser)]
    struct Typed {
        #[command(flatten)]
        request: GpuRequest,
    }

    fn typed(options: &[&str]) -> GpuRequest {
        Typed::try_parse_from([&["outliers"][..], options].concat()).unwrap().request
    }

    fn read(record: Value) -> GpuRequest {
        serde_json::from_value::<Spec>(json!({ "request": record })).unwrap().request
    }

    #[test]
    fn request_is_equal_from_cli_file_and_ledger() {
        let options = ["--gpu-count=2", "--min-vram=79.7", "--max-price=2.5", "--secure", "--min-cuda=12.4", "--spot"];
        let request = typed(&options);
        let file = "gpu-count = 2\nmin-vram = 79.7\nmax_price = 2.5\ntier = 'secure'\nmin_cuda = '12.4'\nspot = true";
        assert_eq!(toml::from_str::<GpuRequest>(file).unwrap(), request);
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(read(serde_json::from_str(&text).unwrap()), request);
        let tiers = [request.tier, typed(&["--community"]).tier, typed(&[]).tier];
        assert_eq!(tiers, [Some(Tier::Secure), Some(Tier::Community), None]);
    }

    #[test]
    fn request_of_an_earlier_version_is_parsed() {
        let old = json!({
            "gpu_count": null, "gpu_filter": "H100", "min_vram": 85_899_345_920_u64, "min_cpu_ram": null,
            "min_disk": 1, "max_price": 2_500_000, "region": null, "tier": "community", "spot": false,
            "min_cuda": null, "worker_cuda": "12.0"
        });
        let request = read(old);
        assert_eq!((request.min_vram, request.min_disk), (Some(Bytes::from_gib(80)), Some(Bytes(1))));
        assert_eq!(request.max_price, Some(UsdPerHour::from_dollars(2.5)));
        assert_eq!((request.tier, request.gpu_filter.as_deref()), (Some(Tier::Community), Some("H100")));
        assert_eq!(request.worker_cuda, Some("12.0".parse().unwrap()));
    }

    #[test]
    fn cli_overrides_the_file() {
        let own = toml::from_str::<GpuRequest>("min-vram = 80\nregion = 'eu'\ntier = 'secure'").unwrap();
        let both = typed(&["--min-vram", "24", "--community"]).merge(own);
        let region = Some("eu".to_owned());
        assert_eq!((both.min_vram, both.region, both.tier), (Some(Bytes::from_gib(24)), region, Some(Tier::Community)));
        for wrong in ["--max-price=0.0000001", "--min-vram=-1", "--min-vram=1e99"] {
            assert!(Typed::try_parse_from(["outliers", wrong]).is_err(), "{wrong}");
        }
        let both = Typed::try_parse_from(["outliers", "--secure", "--community"]).unwrap_err().to_string();
        assert!(both.contains("cannot be used with"), "{both}");
    }
}
