//! Observers of the inputs of a layer's matrices. An input that several matrices read is observed
//! once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::kernels::input_collector::{InputCollector, InputSums};
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
pub type InputKey = (Input, Option<usize>);

/// The collectors of one layer. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct InputCollectors(Arc<Mutex<BTreeMap<InputKey, InputCollector>>>);

impl InputCollectors {
    fn all(&self) -> MutexGuard<'_, BTreeMap<InputKey, InputCollector>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The collector for a matrix; `None` if another matrix with the same input has it.
    pub fn of(&self, role: Role, expert: Option<usize>) -> Option<InputCollector> {
        match self.all().entry((Input::of(role), expert)) {
            Entry::Occupied(_) => None,
            Entry::Vacant(free) => Some(free.insert(InputCollector::default()).clone()),
        }
    }

    /// The collector of the queries of latent attention.
    pub fn queries(&self) -> InputCollector {
        self.all().entry((Input::Queries, None)).or_default().clone()
    }

    /// Returns the sums of all collectors and resets them.
    pub fn take(&self) -> impl Iterator<Item = (InputKey, InputSums)> + use<> {
        std::mem::take(&mut *self.all()).into_iter().map(|(place, collector)| (place, collector.take()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn matrices_with_the_same_input_share_one_collector() {
        let collectors = InputCollectors::default();
        let collected = |role, expert| collectors.of(role, expert).is_some();
        assert!(collected(Role::QProj, None) && !collected(Role::KProj, None) && !collected(Role::OutputGate, None));
        assert!(collected(Role::ExpertUp, Some(0)) && !collected(Role::ExpertGate, Some(0)));
        assert!(collected(Role::ExpertUp, Some(1)));
        assert!(collected(Role::ExpertDown, Some(1)) && collected(Role::OProj, None) && collected(Role::Router, None));
        collectors.queries().add(&Tensor::new(&[[1f32, 2.0]], &Device::Cpu).unwrap()).unwrap();
        let seen: BTreeMap<InputKey, InputSums> = collectors.take().collect();
        assert_eq!(seen.len(), 7);
        assert_eq!(seen[&(Input::Queries, None)].values, [1.0, 2.0]);
        assert_eq!(seen[&(Input::of(Role::ExpertGateUp), Some(1))].rows, 0);
        assert_eq!(collectors.take().count(), 0);
    }
}
