//! Bills of ended instances: exactly one line per instance in `bill.jsonl`.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::record::Record;
use crate::cloud::broker::Instance;
use crate::files::absent;
use crate::units::{Usd, UsdPerHour};

/// Bill of one ended instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BillEntry {
    /// The instance's id.
    pub id: String,
    /// Lease tag of the instance.
    pub name: String,
    /// Price per hour.
    pub price: UsdPerHour,
    /// When it was created, Unix seconds.
    pub from: u64,
    /// End, Unix seconds.
    pub to: u64,
    /// Cost of all started seconds, at least one.
    pub cost: Usd,
}

impl BillEntry {
    /// The entry of an instance that ended at `to`, Unix seconds.
    pub(super) fn new(record: &Record, to: u64) -> Self {
        let seconds = to.saturating_sub(record.created_at).max(1);
        Self {
            id: record.id.clone(),
            name: record.name.clone(),
            price: record.price,
            from: record.created_at,
            to,
            cost: record.price.cost(Duration::from_secs(seconds)),
        }
    }
}

/// Bill of the local broker.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bill {
    /// Ended instances, oldest first.
    pub entries: Vec<BillEntry>,
    /// Instances that still bill, in any state.
    pub running: Vec<Instance>,
}

impl Bill {
    /// Sum over ended instances.
    pub fn total(&self) -> Usd {
        self.entries.iter().map(|entry| entry.cost).sum()
    }
}

/// Appends `entry` to `bill.jsonl` in `root` unless its instance has an entry.
pub(super) fn append(root: &Path, entry: &BillEntry) -> io::Result<()> {
    let path = root.join("bill.jsonl");
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    // Two instances may end at the same time.
    file.lock()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    // A damaged line must not keep an instance from ending.
    if parse(&text).flatten().any(|known| known.id == entry.id) {
        return Ok(());
    }
    // A crash during an earlier append leaves an incomplete line of an instance that is still
    // listed. It is overwritten.
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    file.set_len(whole as u64)?;
    file.seek(SeekFrom::Start(whole as u64))?;
    let mut line = serde_json::to_vec(entry)?;
    line.push(b'\n');
    file.write_all(&line)?;
    file.sync_all()
}

/// All entries in `root`, oldest first.
pub(super) fn read(root: &Path) -> io::Result<Vec<BillEntry>> {
    parse(&absent(fs::read_to_string(root.join("bill.jsonl")))?.unwrap_or_default()).collect()
}

fn parse(text: &str) -> impl Iterator<Item = io::Result<BillEntry>> + '_ {
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(|line| Ok(serde_json::from_str(line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str) -> BillEntry {
        let record = Record {
            id: id.to_owned(),
            name: "outliers-o-r-n-9".to_owned(),
            price: UsdPerHour::from_dollars(0.01),
            hardware: String::new(),
            gpus: vec![],
            created_at: 1000,
        };
        BillEntry::new(&record, 1000)
    }

    #[test]
    fn shortest_rental_of_the_smallest_machine_has_a_cost() {
        assert!(entry("a").cost > Usd::ZERO);
    }

    #[test]
    fn instance_is_billed_once() {
        let root = tempfile::tempdir().unwrap();
        for id in ["a", "b", "a"] {
            append(root.path(), &entry(id)).unwrap();
        }
        let ids: Vec<_> = read(root.path()).unwrap().into_iter().map(|e| e.id).collect();
        assert_eq!(ids, ["a", "b"]);
    }

    #[test]
    fn incomplete_line_is_ignored_and_removed() {
        let root = tempfile::tempdir().unwrap();
        append(root.path(), &entry("a")).unwrap();
        let path = root.path().join("bill.jsonl");
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"id\":\"b\",\"na");
        fs::write(&path, text).unwrap();
        assert_eq!(read(root.path()).unwrap().len(), 1);
        append(root.path(), &entry("b")).unwrap();
        assert_eq!(read(root.path()).unwrap(), [entry("a"), entry("b")]);
    }

    #[test]
    fn damaged_bill_is_an_error_and_is_not_overwritten() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("bill.jsonl"), "nonsense\n").unwrap();
        append(root.path(), &entry("a")).unwrap();
        append(root.path(), &entry("a")).unwrap();
        let text = fs::read_to_string(root.path().join("bill.jsonl")).unwrap();
        assert!(text.starts_with("nonsense\n") && text.lines().count() == 2, "{text}");
        assert!(read(root.path()).is_err());
    }

    #[test]
    fn concurrent_appends_lose_nothing() {
        let root = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for i in 0..16 {
                let root = root.path();
                scope.spawn(move || append(root, &entry(&format!("i{i}"))).unwrap());
            }
        });
        assert_eq!(read(root.path()).unwrap().len(), 16);
    }
}
