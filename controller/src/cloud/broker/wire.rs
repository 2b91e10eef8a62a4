//! Validated parsing of clouds' replies: prices, sizes and hosts are checked for plausibility.

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use serde_json::Value;

use crate::cloud::gpu;
use crate::cloud::http::{Http, Response, percent};
use crate::text::clean;
use crate::units::{Bytes, UsdPerHour};

use super::{BrokerError, BrokerErrorKind, Instance, InstanceId, InstanceState, Lease, Offer, SshEndpoint};

/// 10^9 bytes, the least that clouds mean by a gigabyte of disk.
pub(super) const GB: u64 = 1_000_000_000;
/// A megabyte in a machine's report of its memory.
pub(super) const MIB: u64 = 1 << 20;
/// A gigabyte in a machine's report of its memory.
pub(super) const GIB: u64 = 1 << 30;

/// Maximum plausible price of an instance in dollars per hour.
const HIGHEST_PRICE: f64 = 10_000.0;
/// Maximum plausible size in bytes.
const LARGEST_SIZE: f64 = 1e18;

/// Reads an optional field; an invalid value counts as missing, since an instance with an invalid
/// field still bills.
pub(super) fn lenient<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(from)?).ok())
}

/// Reads a state field of any type. A value that is not a string is unknown, which differs from
/// missing.
pub(super) fn word<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(match Value::deserialize(from)? {
        Value::Null => None,
        Value::String(word) => Some(word),
        other => Some(other.to_string()),
    })
}

/// Reads an id, which clouds write as a string or a number.
pub(super) fn id<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let found = Value::deserialize(from)?;
    text_of_id(&found).ok_or_else(|| D::Error::custom("its id is neither a text nor a number"))
}

/// The id of an object; `None` if it has none.
pub(super) fn id_of(entry: &Value) -> Option<String> {
    text_of_id(entry.get("id")?)
}

fn text_of_id(id: &Value) -> Option<String> {
    match id {
        Value::String(id) => Some(id.clone()).filter(|id| !id.is_empty()),
        Value::Number(id) => Some(id.to_string()),
        _ => None,
    }
}

/// What an offer stands for, as the broker wrote it into its key.
pub(super) fn sku<T: DeserializeOwned>(http: &Http, offer: &Offer) -> Result<T, BrokerError> {
    let wrong = http.error(BrokerErrorKind::Rejected, format!("{:?} is no offer of this cloud's", offer.key));
    if offer.broker != wrong.broker {
        return Err(wrong);
    }
    serde_json::from_str(&offer.key).map_err(|_| wrong)
}

/// An instance that was just rented, where the cloud tells only its id.
pub(super) fn booting(id: String, offer: &Offer, lease: &Lease) -> Instance {
    Instance {
        price: Some(offer.price),
        hardware: hardware(offer.gpu_count, offer.gpu_raw.as_deref().unwrap_or_default(), offer.vram_reported),
        ..Instance::new(&offer.broker, id, lease.tag.to_string(), InstanceState::Booting)
    }
}

/// An id as one segment of a path.
pub(super) fn id_segment(http: &Http, id: &InstanceId) -> Result<String, BrokerError> {
    segment(&id.0).ok_or_else(|| no_id(http, id))
}

/// The error for an id that cannot be one of the cloud's.
pub(super) fn no_id(http: &Http, id: &InstanceId) -> BrokerError {
    http.error(BrokerErrorKind::Rejected, format!("{:?} is no id of this cloud's", id.0))
}

/// Instances out of a cloud's list, each entry read by itself: one that cannot be is shown as
/// such, is nobody else's fault, and is never left out. `read` gives `None` for what is over.
pub(super) fn entries<T: DeserializeOwned>(
    broker: &str,
    list: &[Value],
    read: impl Fn(T) -> Option<Instance>,
) -> Vec<Instance> {
    list.iter().filter_map(|entry| entry_of(broker, entry, &read)).collect()
}

/// As [`entries`], for a reply about one instance. A reply that does not describe it is an error.
pub(super) fn alone<T: DeserializeOwned>(
    reply: &Response,
    broker: &str,
    asked: &InstanceId,
    entry: &Value,
    read: impl Fn(T) -> Option<Instance>,
) -> Result<Option<Instance>, BrokerError> {
    match entry_of(broker, entry, &read) {
        Some(Instance { state: InstanceState::Unreadable(why), id, .. }) if id != *asked => {
            let message = format!("its answer is not an instance ({why}): {}", clean(reply.body.as_bytes(), 120));
            Err(reply.error(reply.unclear(), message))
        }
        read => Ok(read),
    }
}

fn entry_of<T: DeserializeOwned>(
    broker: &str,
    entry: &Value,
    read: &impl Fn(T) -> Option<Instance>,
) -> Option<Instance> {
    let why = match T::deserialize(entry) {
        Ok(found) => return read(found),
        Err(why) => why.to_string(),
    };
    let name = ["name", "label"].iter().find_map(|field| entry.get(field)?.as_str());
    let (id, state) = (id_of(entry).unwrap_or_default(), InstanceState::Unreadable(clean(why.as_bytes(), 200)));
    Some(Instance::new(broker, id, name.unwrap_or_default(), state))
}

/// A price in dollars per hour. `None` if it is implausible.
pub(super) fn price(dollars: f64) -> Option<UsdPerHour> {
    // NaN is in no range.
    (dollars > 0.0 && dollars <= HIGHEST_PRICE).then(|| UsdPerHour::from_dollars(dollars))
}

/// A number of units; `None` if it is implausible.
pub(super) fn size(amount: f64, unit: u64) -> Option<Bytes> {
    let bytes = amount * unit as f64;
    (bytes > 0.0 && bytes <= LARGEST_SIZE).then_some(Bytes(bytes.round() as u64))
}

/// Description of an instance's hardware.
pub(super) fn hardware(count: u32, raw: &str, vram: Option<Bytes>) -> String {
    format!("{count} x {}", gpu::canonical_name(raw, vram))
}

/// An SSH address; `None` if user, host or port is invalid, since people paste addresses into
/// command lines.
pub(super) fn endpoint(user: &str, host: &str, port: u16) -> Option<SshEndpoint> {
    let is_user = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let good_user = user.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && user.chars().all(is_user);
    (good_user && user.len() <= 32 && is_host(host) && port > 0).then(|| SshEndpoint {
        host: host.to_owned(),
        port,
        user: user.to_owned(),
    })
}

/// Whether this is an IP address, or labels of letters, digits and inner dashes.
fn is_host(host: &str) -> bool {
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(inner)
    };
    host.parse::<std::net::IpAddr>().is_ok() || host.len() <= 253 && host.split('.').all(label)
}

/// `text` as one path segment, percent-encoded; `None` for text that would change the path.
pub(super) fn segment(text: &str) -> Option<String> {
    (!matches!(text, "" | "." | "..")).then(|| percent(text, |digits| digits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn implausible_prices_and_sizes_are_unknown() {
        assert_eq!(price(1.8944), Some(UsdPerHour::from_dollars(1.8944)));
        for dollars in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e5] {
            assert_eq!(price(dollars), None, "{dollars}");
        }
        assert_eq!(size(24564.0, MIB), Some(Bytes::from_mib(24564)));
        for amount in [0.0, -80.0, f64::NAN, 1e30] {
            assert_eq!(size(amount, GIB), None, "{amount}");
        }
    }

    #[test]
    fn entries_are_parsed_separately_and_unreadable_ones_shown() {
        #[derive(Deserialize)]
        struct Machine {
            #[serde(deserialize_with = "id")]
            id: String,
            name: String,
        }
        let read = |machine: Machine| {
            let whole = serde_json::json!({
                "broker": "b", "id": machine.id, "name": machine.name, "state": "booting", "price": null,
                "hardware": "", "created_at": null,
            });
            (machine.name != "over").then(|| serde_json::from_value(whole).unwrap())
        };
        let list = serde_json::json!([
            {"id": "a", "name": "x"}, {"id": 7, "name": "y"}, {"id": "c", "name": null}, {"name": "outliers-o-r-n-1"},
            {"id": "", "name": "z"}, 17, {"id": "d", "name": "over"},
        ]);
        let list = list.as_array().unwrap();
        let found = entries("b", list, read);
        let ids: Vec<&str> = found.iter().map(|instance| instance.id.0.as_str()).collect();
        assert_eq!(ids, ["a", "7", "c", "", "", ""]);
        let readable = |instance: &Instance| !matches!(instance.state, InstanceState::Unreadable(_));
        assert_eq!(found.iter().map(readable).collect::<Vec<_>>(), [true, true, false, false, false, false]);
        assert!(found[3].tag().is_some(), "its name tells whose it is");
    }

    #[test]
    fn invalid_ssh_hosts_are_refused() {
        for host in ["203.0.113.42", "2001:db8::1", "ssh5.vast.ai", "a"] {
            assert_eq!(endpoint("root", host, 22).map(|e| e.host), Some(host.to_owned()));
        }
        let hosts = ["", "-oProxyCommand=x", "a b", "a;b", "a..b", "a/b", "203.0.113.42\n", "$(x)", "a-.b"];
        for host in hosts {
            assert_eq!(endpoint("root", host, 22), None, "{host:?}");
        }
        for user in ["", "-l", "a b", "ro\not", "1x"] {
            assert_eq!(endpoint(user, "a", 22), None, "{user:?}");
        }
        assert_eq!(endpoint("root", "a", 0), None);
    }

    #[test]
    fn url_segments_are_encoded() {
        assert_eq!(segment("9f2c-1_a").as_deref(), Some("9f2c-1_a"));
        assert_eq!(segment("a/../b?c#d e").as_deref(), Some("a%2F..%2Fb%3Fc%23d%20e"));
        assert_eq!([segment(""), segment("."), segment("..")], [None, None, None]);
    }
}
