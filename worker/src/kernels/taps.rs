//! Observers of the inputs of a layer's matrices. An input that several matrices read is observed
//! once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::kernels::tap::{InputSums, Tap};
use crate::model::decoder::Role;

/// An input of matrices of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Input {
    /// The input of the matrix with this role and of all that read the same.
    Of(Role),
    /// The queries of latent attention, the input of `kv_b_proj`'s keys where these are multiplied
    /// into the queries.
    Queries,
}

impl Input {
    /// The input of the matrix with this role.
    pub fn of(role: Role) -> Self {
        Self::Of(match role {
            Role::KProj
            | Role::VProj
            | Role::QkvProj
            | Role::OutputGate
            | Role::QAProj
            | Role::KvAProj
            | Role::DeltaQkvz
            | Role::DeltaBa
            | Role::DeltaQkv
            | Role::DeltaGate
            | Role::DeltaStrength
            | Role::DeltaStep
            | Role::DeltaGateDown
            | Role::DeltaStepDown
            | Role::MambaInput => Role::QProj,
            Role::UpProj | Role::GateUpProj => Role::GateProj,
            Role::ExpertUp | Role::ExpertGateUp => Role::ExpertGate,
            Role::SharedUp | Role::SharedGateUp | Role::SharedExpertGate => Role::SharedGate,
            other => other,
        })
    }
}

/// An input, with the expert's index if each expert has a separate one.
pub type Place = (Input, Option<usize>);

/// The taps of one layer. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Taps(Arc<Mutex<BTreeMap<Place, Tap>>>);

impl Taps {
    fn all(&self) -> MutexGuard<'_, BTreeMap<Place, Tap>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tap for a matrix; `None` if another matrix with the same input has it.
    pub fn of(&self, role: Role, expert: Option<usize>) -> Option<Tap> {
        match self.all().entry((Input::of(role), expert)) {
            Entry::Occupied(_) => None,
            Entry::Vacant(free) => Some(free.insert(Tap::default()).clone()),
        }
    }

    /// The tap of the queries of latent attention.
    pub fn queries(&self) -> Tap {
        self.all().entry((Input::Queries, None)).or_default().clone()
    }

    /// Returns the sums of all taps and resets them.
    pub fn take(&self) -> impl Iterator<Item = (Place, InputSums)> + use<> {
        std::mem::take(&mut *self.all()).into_iter().map(|(place, tap)| (place, tap.take()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn matrices_with_the_same_input_share_one_tap() {
        let taps = Taps::default();
        let tapped = |role, expert| taps.of(role, expert).is_some();
        assert!(tapped(Role::QProj, None) && !tapped(Role::KProj, None) && !tapped(Role::OutputGate, None));
        assert!(tapped(Role::ExpertUp, Some(0)) && !tapped(Role::ExpertGate, Some(0)));
        assert!(tapped(Role::ExpertUp, Some(1)));
        assert!(tapped(Role::ExpertDown, Some(1)) && tapped(Role::OProj, None) && tapped(Role::Router, None));
        taps.queries().see(&Tensor::new(&[[1f32, 2.0]], &Device::Cpu).unwrap()).unwrap();
        let seen: BTreeMap<Place, InputSums> = taps.take().collect();
        assert_eq!(seen.len(), 7);
        assert_eq!(seen[&(Input::Queries, None)].values, [1.0, 2.0]);
        assert_eq!(seen[&(Input::of(Role::ExpertGateUp), Some(1))].rows, 0);
        assert_eq!(taps.take().count(), 0);
    }
}
