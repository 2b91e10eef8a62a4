//! Identifies GPUs by the names of clouds and drivers.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, CudaVersion};

/// A known GPU model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuModel {
    /// Name in offers, tables and filters.
    pub name: &'static str,
    /// Nominal memory. A driver reports up to a tenth less.
    pub vram: Bytes,
}

/// Canonical name, memory in GiB, dense bf16 operations per second in 10^12, and the words that
/// must all be in the raw name. The first that fits counts, so a longer description stands before a
/// shorter one.
///
/// Operations are those of the makers' data sheets: of fp16 where a GPU has no bf16, of the slower
/// form where one name is sold in several, and 0 for what is not NVIDIA's.
const MODELS: &[(&str, u64, f64, &[&str])] = &[
    ("GB300", 288, 2500.0, &["gb300"]),
    ("B300", 288, 2250.0, &["b300"]),
    ("GB200", 192, 2500.0, &["gb200"]),
    ("B200", 192, 2250.0, &["b200"]),
    ("GH200-144GB", 144, 989.0, &["gh200", "144g"]),
    ("GH200", 96, 989.0, &["gh200"]),
    ("H200", 141, 835.0, &["h200"]),
    ("H100-94GB", 94, 835.0, &["h100", "nvl"]),
    ("H100", 80, 756.0, &["h100"]),
    ("A100X", 80, 312.0, &["a100x"]),
    ("A800", 80, 312.0, &["a800"]),
    ("A100-40GB", 40, 312.0, &["a100", "40gb"]),
    ("A100-80GB", 80, 312.0, &["a100", "80gb"]),
    ("L40S", 48, 362.0, &["l40s"]),
    ("L40", 48, 181.0, &["l40"]),
    ("L4", 24, 121.0, &["l4"]),
    ("A40", 48, 150.0, &["a40"]),
    ("A30", 24, 165.0, &["a30"]),
    ("A10G", 24, 70.0, &["a10g"]),
    ("A10", 24, 125.0, &["a10"]),
    ("V100-32GB", 32, 112.0, &["v100", "32gb"]),
    ("V100-16GB", 16, 112.0, &["v100", "16gb"]),
    ("T4", 16, 65.0, &["t4"]),
    ("RTX PRO 6000", 96, 400.0, &["rtx", "pro", "6000"]),
    ("RTX PRO 6000", 96, 400.0, &["rtx", "pro", "6000b"]),
    ("RTX 6000 Ada", 48, 364.0, &["6000", "ada"]),
    ("RTX 6000 Ada", 48, 364.0, &["6000ada"]),
    ("RTX 5000 Ada", 32, 261.0, &["5000", "ada"]),
    ("RTX 5000 Ada", 32, 261.0, &["5000ada"]),
    ("RTX 4000 Ada", 20, 107.0, &["4000", "ada"]),
    ("RTX 4000 Ada", 20, 107.0, &["4000ada"]),
    ("A6000", 48, 155.0, &["a6000"]),
    ("A5000", 24, 111.0, &["a5000"]),
    ("A4500", 20, 95.0, &["a4500"]),
    ("A4000", 16, 77.0, &["a4000"]),
    ("RTX 5090", 32, 209.0, &["5090"]),
    ("RTX 5080", 16, 113.0, &["5080"]),
    ("RTX 4090", 24, 165.0, &["4090"]),
    ("RTX 4080", 16, 97.0, &["4080"]),
    ("RTX 3090", 24, 71.0, &["3090"]),
    ("RTX 3090", 24, 71.0, &["3090ti"]),
    ("MI355X", 288, 0.0, &["mi355x"]),
    ("MI325X", 256, 0.0, &["mi325x"]),
    ("MI300X", 192, 0.0, &["mi300x"]),
];

/// Compute capability times ten, and its models by the words that their names must contain. The
/// first match counts, so newer lines come before older ones with the same number. Source:
/// NVIDIA's table "CUDA GPUs".
const CAPABILITIES: &[(u32, &[&str])] = &[
    (121, &["gb10"]),
    (120, &["rtx pro", "5090", "5080", "5070", "5060", "5050"]),
    (103, &["gb300", "b300"]),
    (100, &["gb200", "b200", "b100"]),
    (90, &["gh200", "h200", "h800", "h100", "h20"]),
    (89, &["ada", "6000ada", "5880ada", "5000ada", "4500ada", "4000ada", "2000ada"]),
    (89, &["l40s", "l40", "l20", "l4", "l2", "4090", "4080", "4070", "4060", "4050"]),
    (87, &["orin"]),
    (86, &["a40", "a16", "a10", "a10g", "a10m", "a2", "a6000", "a5500", "a5000", "a4500", "a4000", "a2000", "a1000"]),
    (86, &["3090", "3080", "3070", "3060", "3050"]),
    (80, &["a100", "a100x", "a800", "a30", "a30x"]),
    (75, &["t4", "t4g", "t1000", "t600", "t400", "2080", "2070", "2060", "titan rtx"]),
    (75, &["rtx 8000", "rtx 6000", "rtx 5000", "rtx 4000", "rtx 3000", "gtx 1660", "gtx 1650", "gtx 1630"]),
    (70, &["v100", "v100s", "gv100", "titan v"]),
    (61, &["p40", "p6", "p4", "gtx", "titan", "quadro"]),
    (60, &["p100", "gp100"]),
    (52, &["m60", "m40", "m10", "m6", "m4"]),
    (37, &["k80"]),
];

/// Minimum compute capability of the worker times ten: bf16, from Ampere on.
pub const MIN_CAPABILITY: u32 = 80;

/// Minimum CUDA version of the driver for the worker's GPU code.
pub const OLDEST_CUDA: CudaVersion = CudaVersion { major: 11, minor: 8 };

/// Modules with an ARM host processor, or GPUs integrated with one.
const WITH_ARM: &[&str] = &["gh200", "gb200", "gb300", "gb10", "orin", "t4g"];

/// Operations per second where it is known that the form is the quicker one.
const SXM_PEAKS: &[(&str, f64)] = &[("H200", 989.0), ("H100", 989.0)];
/// Those of a GPU whose memory, and so its canonical name, is not known.
const A100: (&str, f64) = ("A100", 312.0);

/// Peak of one GPU in dense bf16 operations per second, by its canonical name and form.
pub fn peak(name: &str, form: Option<Form>) -> Option<f64> {
    let quicker = if form == Some(Form::Sxm) { SXM_PEAKS } else { &[] };
    let mut known = quicker.iter().copied().chain(peaks()).chain([A100]);
    known.find(|(known, _)| *known == name).map(|(_, tera)| tera * 1e12)
}

/// The lowest peak in the table, for GPUs outside it.
pub fn slowest_peak() -> f64 {
    peaks().map(|(_, tera)| tera * 1e12).fold(f64::INFINITY, f64::min)
}

fn peaks() -> impl Iterator<Item = (&'static str, f64)> {
    MODELS.iter().map(|(name, _, tera, _)| (*name, *tera)).filter(|(_, tera)| *tera > 0.0)
}

/// Words that denote another product: a laptop GPU has other memory than the card with its name.
const OTHERS: &[&str] = &["laptop", "mobile", "mig", "max"];

/// NVIDIA's product lines, for models outside the table.
const LINES: &[&str] = &["nvidia", "geforce", "rtx", "gtx", "tesla", "quadro", "titan", "a100", "v100", "p100", "k80"];

/// The model of a raw name. `vram`, if known, distinguishes variants with one name (A100 with 40
/// and 80 GB).
pub fn identify(raw: &str, vram: Option<Bytes>) -> Option<GpuModel> {
    let words = model_words(raw);
    let has = |word: &str| words.iter().any(|w| w == word);
    if OTHERS.iter().any(|other| has(other)) {
        return None;
    }
    let named = MODELS.iter().find(|(.., needed)| needed.iter().all(|word| has(word)));
    // The name alone leaves the size open: the nearest of the sizes sold.
    let family = |needed: &[&str]| needed.first().is_some_and(|word| has(word)) && needed.len() > 1;
    let measured = || {
        let vram = vram?;
        let sizes = MODELS.iter().filter(|(.., needed)| ["a100", "v100"].contains(&needed[0]) && family(needed));
        sizes.min_by_key(|(_, gib, ..)| vram.0.abs_diff(gib << 30))
    };
    let (name, gib, ..) = named.or_else(measured)?;
    Some(GpuModel { name, vram: Bytes::from_gib(*gib) })
}

/// Form factor of a GPU, which determines its power and interconnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// On a board with NVLink.
    Sxm,
    /// A PCIe card.
    Pcie,
    /// Paired cards with an NVLink bridge.
    Nvl,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sxm => "SXM",
            Self::Pcie => "PCIe",
            Self::Nvl => "NVL",
        })
    }
}

/// The form, if the raw name states it.
pub fn form(raw: &str) -> Option<Form> {
    let words = words(raw);
    let has = |word: &str| words.iter().any(|w| w == word);
    match () {
        () if words.iter().any(|word| word.starts_with("sxm")) => Some(Form::Sxm),
        // The driver's name of the SXM variant.
        () if has("h100") && has("hbm3") => Some(Form::Sxm),
        () if has("nvl") => Some(Form::Nvl),
        () if has("pcie") => Some(Form::Pcie),
        () => None,
    }
}

/// Whether a name is an NVIDIA GPU: by the table, else by product lines. A cloud's vendor field is
/// not used.
pub fn is_nvidia(raw: &str) -> bool {
    let is_other = identify(raw, None).is_some_and(|model| model.name.starts_with("MI"));
    !is_other && (capability(raw).is_some() || LINES.iter().any(|line| words(raw).iter().any(|word| word == line)))
}

/// Compute capability times ten (80 for 8.0), for models in the table.
pub fn capability(raw: &str) -> Option<u32> {
    let words = model_words(raw);
    // A suffix may be attached to the number: `3090ti`, `4090d`.
    let is = |word: &str, model: &str| {
        let number = model.bytes().all(|b| b.is_ascii_digit());
        let rest = word.strip_prefix(model);
        rest.is_some_and(|rest| rest.is_empty() || number && !rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let has = |model: &str| model.split(' ').all(|part| words.iter().any(|word| is(word, part)));
    CAPABILITIES.iter().find(|(_, models)| models.iter().any(|model| has(model))).map(|(capability, _)| *capability)
}

/// Whether the host processor is ARM, which does not run programs for x86-64.
pub fn is_with_arm(raw: &str) -> bool {
    words(raw).iter().any(|word| WITH_ARM.contains(&word.as_str()))
}

/// The canonical name; the raw name without vendor for models outside the table.
pub fn canonical_name(raw: &str, vram: Option<Bytes>) -> String {
    if let Some(model) = identify(raw, vram) {
        return model.name.to_owned();
    }
    let raw = raw.trim();
    raw.strip_prefix("NVIDIA ").or_else(|| raw.strip_prefix("AMD ")).unwrap_or(raw).to_owned()
}

/// Memory to compare with `--min-vram`: the nominal memory if the driver's figure is slightly
/// lower, else the driver's figure.
pub fn nominal_vram(raw: &str, reported: Option<Bytes>) -> Option<Bytes> {
    let sold = identify(raw, reported).map(|model| model.vram);
    match (sold, reported) {
        (Some(sold), Some(reported)) if sold.0.abs_diff(reported.0) > sold.0 / 10 => Some(reported),
        (sold, reported) => sold.or(reported),
    }
}

/// Whether `filter` is a part of a GPU's canonical or raw name. Case and separators are ignored,
/// and numbers match as a whole: `L4` does not match `L40S`, nor `A10` `A100`.
pub fn matches(filter: &str, name: &str) -> bool {
    let (filter, name) = (words(filter), words(name));
    filter.is_empty() || contains(&name.join(" "), &filter.join(" ")) || contains(&name.concat(), &filter.concat())
}

fn contains(name: &str, part: &str) -> bool {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    let (first, last) = (part.chars().next(), part.chars().next_back());
    name.match_indices(part).any(|(at, _)| {
        let (before, after) = (name[..at].chars().next_back(), name[at + part.len()..].chars().next());
        let split = digit(before) && digit(first) || digit(last) && digit(after);
        !split
    })
}

/// The words of a name. A product line is a word even if attached to the model, as in `RTX4090`.
fn model_words(name: &str) -> Vec<String> {
    let split =
        |word: String| match word.strip_prefix("rtx").filter(|model| model.starts_with(|c: char| c.is_ascii_digit())) {
            Some(model) => vec!["rtx".to_owned(), model.to_owned()],
            None => vec![word],
        };
    words(name).into_iter().flat_map(split).collect()
}

fn words(name: &str) -> Vec<String> {
    let lower = name.to_lowercase();
    lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gpu_names_of_all_clouds_are_normalised() {
        for (raw, mib, name) in [
            ("NVIDIA A100-SXM4-80GB", Some(81920), "A100-80GB"),
            ("NVIDIA A100-PCIE-40GB", Some(40960), "A100-40GB"),
            ("NVIDIA A100 80GB PCIe", None, "A100-80GB"),
            ("A100 SXM4", Some(40960), "A100-40GB"),
            ("A100 SXM4", Some(81920), "A100-80GB"),
            ("gpu_8x_a100_80gb_sxm4", None, "A100-80GB"),
            ("NVIDIA H100 80GB HBM3", Some(81559), "H100"),
            ("H100 NVL", None, "H100-94GB"),
            ("NVIDIA H200", Some(143771), "H200"),
            ("NVIDIA B200", Some(183359), "B200"),
            ("NVIDIA L4", Some(23034), "L4"),
            ("NVIDIA L40S", Some(46068), "L40S"),
            ("NVIDIA A40", Some(46068), "A40"),
            ("NVIDIA RTX A6000", Some(49140), "A6000"),
            ("NVIDIA RTX 6000 Ada Generation", Some(49140), "RTX 6000 Ada"),
            ("NVIDIA GeForce RTX 4090", Some(24564), "RTX 4090"),
            ("RTX_5090", None, "RTX 5090"),
            ("NVIDIA A10G", None, "A10G"),
            ("Tesla V100-SXM2-16GB", Some(16160), "V100-16GB"),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", Some(16376), "GeForce RTX 4090 Laptop GPU"),
            ("NVIDIA Quadro P400", Some(2048), "Quadro P400"),
            ("A100", None, "A100"),
            ("A100 PCIE", Some(40960), "A100-40GB"),
            ("H100 SXM", Some(81559), "H100"),
            ("H200 NVL", Some(143_771), "H200"),
            ("RTX 6000Ada", Some(49140), "RTX 6000 Ada"),
            ("RTX 4000Ada", Some(20475), "RTX 4000 Ada"),
            ("RTX PRO 6000 WS", Some(97887), "RTX PRO 6000"),
            ("Tesla V100", Some(32510), "V100-32GB"),
            ("RTX 4090D", Some(49140), "RTX 4090D"),
            ("A100_80GB SXM4", Some(81920), "A100-80GB"),
            ("RTX4090_24GB PCIe", None, "RTX 4090"),
            ("RTX3090Ti_24GB PCIe", None, "RTX 3090"),
            ("RTX5000Ada_32GB PCIe", None, "RTX 5000 Ada"),
            ("RTX_PRO_6000B_96GB PCIe", None, "RTX PRO 6000"),
            ("RTX6000_24GB PCIe", None, "RTX6000_24GB PCIe"),
            ("H200_141GB SXM5", None, "H200"),
            ("GH200_96GB PCIe", None, "GH200"),
            ("L40S_48GB PCIe", None, "L40S"),
        ] {
            assert_eq!(canonical_name(raw, mib.map(Bytes::from_mib)), name, "{raw}");
        }
    }

    #[test]
    fn gpu_form_factors_are_parsed() {
        for (raw, expected) in [
            ("NVIDIA H100 80GB HBM3", Some(Form::Sxm)),
            ("H100 (80 GB SXM5)", Some(Form::Sxm)),
            ("NVIDIA A100-SXM4-80GB", Some(Form::Sxm)),
            ("gpu_8x_a100_80gb_sxm4", Some(Form::Sxm)),
            ("A100 PCIE", Some(Form::Pcie)),
            ("NVIDIA A100 80GB PCIe", Some(Form::Pcie)),
            ("NVIDIA H100 NVL", Some(Form::Nvl)),
            ("H200", None),
            ("RTX 4090", None),
        ] {
            assert_eq!(form(raw), expected, "{raw}");
        }
        assert!(peak("H100", Some(Form::Sxm)) > peak("H100", Some(Form::Pcie)));
        assert_eq!(peak("L4", Some(Form::Sxm)), peak("L4", None));
    }

    #[test]
    fn gpu_makers_are_parsed_from_names() {
        for (raw, nvidia) in [
            ("NVIDIA H100 PCIe", true),
            ("RTX 4090", true),
            ("A100 SXM4", true),
            ("NVIDIA RTX 9999 Future", true),
            ("A100X", true),
            ("AMD Instinct MI300X OAM", false),
            ("MI300X", false),
            ("Radeon RX 7900", false),
            ("Gaudi2", false),
        ] {
            assert_eq!(is_nvidia(raw), nvidia, "{raw}");
        }
        for (name, ..) in MODELS {
            let (peak, capability) = (peak(name, None), capability(name));
            assert_eq!(peak.is_some(), !name.starts_with("MI"), "{name} has no peak, or is none of NVIDIA's");
            assert_eq!(capability.is_some(), peak.is_some(), "{name} has a capability");
        }
    }

    #[test]
    fn compute_capabilities_are_found_by_name() {
        for (raw, expected) in [
            ("Tesla V100", Some(70)),
            ("Tesla V100-SXM2-16GB", Some(70)),
            ("Q RTX 8000", Some(75)),
            ("Quadro RTX 6000", Some(75)),
            ("RTX6000_24GB PCIe", Some(75)),
            ("Titan V", Some(70)),
            ("Titan Xp", Some(61)),
            ("Titan RTX", Some(75)),
            ("Tesla T4", Some(75)),
            ("Tesla P100", Some(60)),
            ("Tesla P40", Some(61)),
            ("Tesla K80", Some(37)),
            ("RTX 2080 Ti", Some(75)),
            ("RTX 2060S", Some(75)),
            ("GTX 1080 Ti", Some(61)),
            ("GTX 1660 S", Some(75)),
            ("Quadro P4000", Some(61)),
            ("A100X", Some(80)),
            ("A100 SXM4", Some(80)),
            ("A800 PCIE", Some(80)),
            ("A30", Some(80)),
            ("A40", Some(86)),
            ("NVIDIA A10G", Some(86)),
            ("RTX A4000", Some(86)),
            ("Quadro RTX A6000", Some(86)),
            ("RTX3090Ti_24GB PCIe", Some(86)),
            ("RTX 3060 laptop", Some(86)),
            ("RTX 4090D", Some(89)),
            ("RTX 4070S Ti", Some(89)),
            ("RTX 6000Ada", Some(89)),
            ("NVIDIA RTX 6000 Ada Generation", Some(89)),
            ("NVIDIA RTX 4000 SFF Ada Generation", Some(89)),
            ("NVIDIA L40S", Some(89)),
            ("NVIDIA H100 NVL", Some(90)),
            ("GH200 SXM", Some(90)),
            ("NVIDIA B200", Some(100)),
            ("B300 SXM6", Some(103)),
            ("NVIDIA RTX PRO 6000 Blackwell Server Edition", Some(120)),
            ("RTX 5070 Ti", Some(120)),
            ("NVIDIA RTX 9999 Future", None),
            ("MI300X", None),
            ("", None),
        ] {
            assert_eq!(capability(raw), expected, "{raw}");
        }
        for (raw, arm) in
            [("GH200 SXM", true), ("GB200", true), ("NVIDIA GB300", true), ("H200", false), ("B200", false)]
        {
            assert_eq!(is_with_arm(raw), arm, "{raw}");
        }
    }

    #[test]
    fn every_runpod_gpu_is_recognised() {
        for (id, gb, name) in [
            ("NVIDIA A100 80GB PCIe", 80, "A100-80GB"),
            ("NVIDIA A100-SXM4-80GB", 80, "A100-80GB"),
            ("NVIDIA H100 PCIe", 80, "H100"),
            ("NVIDIA H100 80GB HBM3", 80, "H100"),
            ("NVIDIA H100 NVL", 94, "H100-94GB"),
            ("NVIDIA H200", 141, "H200"),
            ("NVIDIA H200 NVL", 143, "H200"),
            ("NVIDIA B200", 180, "B200"),
            ("NVIDIA L40S", 48, "L40S"),
            ("NVIDIA L40", 48, "L40"),
            ("NVIDIA L4", 24, "L4"),
            ("NVIDIA A40", 48, "A40"),
            ("NVIDIA RTX A6000", 48, "A6000"),
            ("NVIDIA RTX 6000 Ada Generation", 48, "RTX 6000 Ada"),
            ("NVIDIA GeForce RTX 4090", 24, "RTX 4090"),
            ("NVIDIA GeForce RTX 5090", 32, "RTX 5090"),
            ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 96, "RTX PRO 6000"),
        ] {
            let reported = Bytes::from_gib(gb);
            assert_eq!(canonical_name(id, Some(reported)), name, "{id}");
            assert_eq!(canonical_name(id, None), name, "{id}");
            assert_eq!(nominal_vram(id, Some(reported)), identify(id, None).map(|model| model.vram), "{id}");
        }
    }

    #[test]
    fn nominal_vram_is_used_unless_the_driver_disagrees() {
        let nominal = |raw, mib| nominal_vram(raw, Some(Bytes::from_mib(mib)));
        assert_eq!(nominal("NVIDIA H100 80GB HBM3", 81559), Some(Bytes::from_gib(80)));
        assert_eq!(nominal("NVIDIA L4", 23034), Some(Bytes::from_gib(24)));
        assert_eq!(nominal("NVIDIA H100 80GB HBM3", 40960), Some(Bytes::from_gib(40)));
        assert_eq!(nominal("Some GPU", 5000), Some(Bytes::from_mib(5000)));
        assert_eq!(nominal_vram("NVIDIA A40", None), Some(Bytes::from_gib(48)));
        assert_eq!(nominal_vram("Some GPU", None), None);
    }

    #[test]
    fn gpu_filter_matches_whole_name_parts() {
        for (filter, name, expected) in [
            ("a100", "A100-80GB", true),
            ("A100-80", "A100-80GB", true),
            ("A100 80GB", "NVIDIA A100-SXM4-80GB", false),
            ("A10", "A100-80GB", false),
            ("L4", "L40S", false),
            ("L40", "L40S", true),
            ("H20", "H200", false),
            ("4090", "NVIDIA GeForce RTX 4090", true),
            ("rtx4090", "RTX 4090", true),
            ("RTX", "RTX 4090", true),
            ("H100", "NVIDIA H100 80GB HBM3", true),
            ("100", "NVIDIA H100 80GB HBM3", true),
            ("", "anything", true),
        ] {
            assert_eq!(matches(filter, name), expected, "{filter} in {name}");
        }
    }

    proptest! {
        #[test]
        fn gpu_filter_matches_its_own_name(name in "\\PC{0,30}") {
            prop_assert!(matches(&name, &name));
        }

        #[test]
        fn any_gpu_name_parses_without_panic(name in "\\PC{0,40}", mib in proptest::option::of(0u64..1_000_000)) {
            let vram = mib.map(Bytes::from_mib);
            let named = format!("x{name}");
            prop_assert!(!canonical_name(&named, vram).is_empty());
        }
    }
}
