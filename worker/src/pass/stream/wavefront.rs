//! Schedules the layers on the devices: while one computes the last hidden states of a layer, the
//! next computes the first ones of the following layer.
//!
//! Every device has two threads. The loader loads the units of the device's layers, in order and
//! as far ahead as its memory for weights allows. The computing thread applies units to waves as
//! both arrive. It always chooses the earliest unit that a wave waits for, so that weights are
//! dropped soon. Waves pass each unit in order, whatever the speed of the threads: no result
//! depends on the schedule. The earliest unfinished layer never waits for a later one, so there is
//! no deadlock.
//!
//! One more thread waits for the statistics of each layer that all waves have passed, and joins
//! them in the order of layers, so that no device waits for its own statistics.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use candle_core::Tensor;

use super::layer::{Block, LayerContext, RopeTables};
use super::{Pass, Wave};
use crate::device::Placement;
use crate::device::gpu::{self, ReleaseFence};
use crate::error::{Result, WorkerError};
use crate::kernels::product;
use crate::model::decoder::StreamingUnit;
use crate::pass::loader::{LoadedUnit, PendingUpload, TensorPool};
use crate::pass::meter::{Clock, Subject, Thread, Work};
use crate::pass::savepoint::SavePoints;
use crate::stats::{LayerObserver, Observer};

/// Events that a device waits for.
enum Event {
    /// The next unit of its layers, or the error that ended loading.
    Loaded(Result<PendingUpload<LoadedUnit>>),
    /// A wave, at the first unit of a layer.
    Arrived(usize, Wave),
    /// Another thread has failed.
    Stop,
}

/// Memory that is no longer needed.
struct PendingRelease {
    bytes: u64,
    /// Signals when it is free: a GPU may lag far behind the commands it was given.
    release_fence: Option<ReleaseFence>,
}

/// Layers that all waves have passed.
struct Passed<L> {
    /// Observations by layer, not yet joined.
    layers: BTreeMap<usize, L>,
    /// The first layer that is not yet joined.
    next: usize,
}

/// State shared by all threads.
pub(super) struct Wavefront<'p, O: Observer> {
    pass: &'p Pass<'p>,
    /// Units of all layers in order.
    units: Vec<StreamingUnit>,
    waves: usize,
    observer: Mutex<&'p mut O>,
    passed: Mutex<Passed<O::Layer>>,
    /// Signals changes of `passed` and `stopped`.
    changed: Condvar,
    save: Mutex<Option<&'p mut SavePoints>>,
    tables: RopeTables,
    /// Masks of each device.
    masks: Vec<Vec<Tensor>>,
    inboxes: Vec<Sender<Event>>,
    arrived: Mutex<Vec<Wave>>,
    stopped: AtomicBool,
    failed: Mutex<Option<WorkerError>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Moves `waves` through the layers from `first` on, and returns them.
///
/// # Errors
/// The first error of any thread, with its unit and device. The other threads stop soon.
pub(super) fn run<O: Observer>(
    pass: &Pass<'_>,
    first: usize,
    waves: Vec<Wave>,
    observer: &mut O,
    save: Option<&mut SavePoints>,
) -> Result<Vec<Wave>> {
    let (inboxes, mail): (Vec<Sender<Event>>, Vec<Receiver<Event>>) = pass.devices.iter().map(|_| channel()).unzip();
    let masks = |placement: &Placement| pass.arms.masks(pass.compute, &placement.device);
    let wavefront = Wavefront {
        masks: pass.devices.iter().map(masks).collect::<Result<_>>()?,
        pass,
        units: pass.units(first),
        waves: waves.len(),
        observer: Mutex::new(observer),
        passed: Mutex::new(Passed { layers: BTreeMap::new(), next: first }),
        changed: Condvar::new(),
        save: Mutex::new(save),
        tables: RopeTables::new(pass.tokens.tokens),
        inboxes,
        arrived: Mutex::default(),
        stopped: AtomicBool::new(false),
        failed: Mutex::default(),
    };
    waves.into_iter().for_each(|wave| wavefront.send_on(0, wave));
    let spares: Vec<TensorPool> =
        (0..pass.devices.len()).map(|device| TensorPool::new(wavefront.room(device))).collect();
    thread::scope(|scope| {
        scope.spawn(|| wavefront.watched(|| wavefront.join()));
        for ((device, mail), pool) in mail.into_iter().enumerate().zip(&spares) {
            let (freed, room) = channel();
            let wavefront = &wavefront;
            scope.spawn(move || wavefront.watched(|| wavefront.load(device, pool, &room)));
            scope.spawn(move || wavefront.watched(|| DeviceWorker::new(wavefront, device, pool, freed).run(&mail)));
        }
    });
    let failed = lock(&wavefront.failed).take();
    failed.map_or_else(|| Ok(std::mem::take(&mut *lock(&wavefront.arrived))), Err)
}

/// Reports a panic of a thread to the others.
struct PanicGuard<'a, 'p, O: Observer>(&'a Wavefront<'p, O>);

impl<O: Observer> Drop for PanicGuard<'_, '_, O> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(WorkerError::internal("a thread of the pass panicked"));
        }
    }
}

impl<O: Observer> Wavefront<'_, O> {
    /// Runs a thread's work. An error stops all threads.
    fn watched(&self, work: impl FnOnce() -> Result<()>) {
        let _alarm = PanicGuard(self);
        if let Err(error) = work() {
            self.fail(error);
        }
    }

    fn fail(&self, error: WorkerError) {
        lock(&self.failed).get_or_insert(error);
        self.stopped.store(true, Ordering::Relaxed);
        // A thread that has seen `stopped` unset under this lock is waiting by now.
        drop(lock(&self.passed));
        self.changed.notify_all();
        for inbox in &self.inboxes {
            // The receiver is gone if the device has finished.
            let _ = inbox.send(Event::Stop);
        }
    }

    fn device_of(&self, layer: usize) -> usize {
        layer % self.pass.devices.len()
    }

    fn placement(&self, device: usize) -> &Placement {
        &self.pass.devices[device]
    }

    /// A device's units, with their indices among all.
    fn units_of(&self, device: usize) -> impl Iterator<Item = (usize, &StreamingUnit)> {
        self.units.iter().enumerate().filter(move |(_, unit)| self.device_of(unit.layer) == device)
    }

    /// Bytes for decoded weights on a device: its two largest units, one in use and one being
    /// loaded, or more smaller ones.
    fn room(&self, device: usize) -> u64 {
        let mut sizes: Vec<u64> = self.units_of(device).map(|(_, unit)| self.bytes(unit)).collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.iter().take(2).sum()
    }

    /// Decoded bytes of a unit.
    fn bytes(&self, unit: &StreamingUnit) -> u64 {
        let device = &self.placement(self.device_of(unit.layer)).device;
        self.pass.model.kept_bytes(unit.layer, &unit.needs, self.pass.compute, product::takes_bf16(device))
    }

    /// Sends a wave to the device of unit `number`, or to the results after the last unit.
    fn send_on(&self, number: usize, wave: Wave) {
        let Some(unit) = self.units.get(number) else { return lock(&self.arrived).push(wave) };
        // The receiver is gone only after a failure.
        let _ = self.inboxes[self.device_of(unit.layer)].send(Event::Arrived(number, wave));
    }

    /// Runs the loader of a device. `room` receives freed memory.
    fn load(&self, device: usize, pool: &TensorPool, room: &Receiver<PendingRelease>) -> Result<()> {
        let mut loader = self.pass.loader(device, pool)?;
        let limit = if self.pass.read_ahead { self.room(device) } else { 0 };
        let mut held = 0;
        for (_, unit) in self.units_of(device) {
            let bytes = self.bytes(unit);
            while held > 0 && held + bytes > limit {
                // The device's thread has ended and reported its error.
                let Ok(PendingRelease { bytes, release_fence }) = room.recv() else { return Ok(()) };
                release_fence.map(ReleaseFence::wait).transpose()?;
                held -= bytes;
            }
            if self.stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
            loader.about(Subject { layer: Some(unit.layer), micro_batches: None });
            let loaded = loader.unit(unit.layer, &unit.needs);
            let loaded = loaded.map_err(|error| self.locate(error, unit, device));
            let failed = loaded.is_err();
            held += bytes;
            if self.inboxes[device].send(Event::Loaded(loaded)).is_err() || failed {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Joins the observations of all layers, in order, each as soon as it has passed and its
    /// statistics have arrived.
    fn join(&self) -> Result<()> {
        for units in self.units.chunk_by(|unit, next| unit.layer == next.layer) {
            let last = &units[units.len() - 1];
            let Some(mut passed) = self.when(|passed| passed.layers.contains_key(&last.layer)) else { return Ok(()) };
            let seen = passed.layers.remove(&last.layer);
            drop(passed);
            if let Some(mut seen) = seen {
                let settled = LayerObserver::synchronize(&mut seen);
                settled.map_err(|error| self.locate(error, last, self.device_of(last.layer)))?;
                lock(&self.observer).join(seen);
            }
            lock(&self.passed).next = last.layer + 1;
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Waits for a state of the passed layers; `None` if a thread has failed before.
    fn when(&self, is_so: impl Fn(&Passed<O::Layer>) -> bool) -> Option<MutexGuard<'_, Passed<O::Layer>>> {
        let waits = |passed: &mut Passed<O::Layer>| !is_so(passed) && !self.stopped.load(Ordering::Relaxed);
        let passed = self.changed.wait_while(lock(&self.passed), waits).unwrap_or_else(PoisonError::into_inner);
        is_so(&passed).then_some(passed)
    }

    /// Adds the location to an error. With a single device it is the unit.
    fn locate(&self, error: WorkerError, unit: &StreamingUnit, device: usize) -> WorkerError {
        match self.pass.devices.len() {
            1 => error.context(unit),
            _ => error.context(format!("{unit} on {}", self.placement(device).name)),
        }
    }
}

/// A unit whose weights are on the device.
struct ResidentUnit {
    number: usize,
    /// An error is reported when a wave needs the unit. Work before it can still be computed and
    /// saved.
    block: Result<Block>,
    memory: Vec<Tensor>,
    /// Number of waves that have passed it.
    passed: usize,
}

/// State of a device's computing thread.
struct DeviceWorker<'a, 'p, O: Observer> {
    front: &'a Wavefront<'p, O>,
    device: usize,
    clock: Clock<'a>,
    pool: &'a TensorPool,
    freed: Sender<PendingRelease>,
    /// Indices of the units still to be loaded.
    coming: VecDeque<usize>,
    /// Loaded units, in order.
    held: VecDeque<ResidentUnit>,
    /// Waiting waves by the index of their next unit, in order.
    ready: BTreeMap<usize, VecDeque<Wave>>,
    /// Observations of the layers that have begun.
    seen: BTreeMap<usize, O::Layer>,
    /// Waves that wait together before a unit for a save point.
    gate: Option<(usize, Vec<Wave>)>,
}

impl<'a, 'p, O: Observer> DeviceWorker<'a, 'p, O> {
    fn new(front: &'a Wavefront<'p, O>, device: usize, pool: &'a TensorPool, freed: Sender<PendingRelease>) -> Self {
        Self {
            front,
            device,
            clock: front.pass.meter.clock(Thread::Device(device)),
            pool,
            freed,
            coming: front.units_of(device).map(|(number, _)| number).collect(),
            held: VecDeque::new(),
            ready: BTreeMap::new(),
            seen: BTreeMap::new(),
            gate: None,
        }
    }

    fn run(&mut self, mail: &Receiver<Event>) -> Result<()> {
        // While the first weights are read.
        let (pass, device) = (self.front.pass, &self.front.placement(self.device).device);
        let experts = pass.model.spec.layers.iter().any(|layer| layer.experts() > 0);
        if let Some(why) = product::get_ready(device, pass.compute, experts)? {
            pass.progress.warn(format!("experts are multiplied one by one, which may take longer: {why}"));
        }
        while !(self.coming.is_empty() && self.held.is_empty() || self.front.stopped.load(Ordering::Relaxed)) {
            let event = match self.next() {
                Some(at) => {
                    self.step(at)?;
                    mail.try_recv().ok()
                }
                None => self.clock.time(Work::Waiting, || mail.recv()).ok(),
            };
            match event {
                Some(Event::Loaded(loaded)) => self.hold(loaded)?,
                Some(Event::Arrived(number, wave)) => self.receive(number, wave)?,
                Some(Event::Stop) | None => {}
            }
        }
        Ok(())
    }

    /// The earliest unit that a wave waits for.
    fn next(&self) -> Option<usize> {
        let waits = |held: &ResidentUnit| self.ready.get(&held.number).is_some_and(|waves| !waves.is_empty());
        self.held.iter().position(waits)
    }

    fn hold(&mut self, loaded: Result<PendingUpload<LoadedUnit>>) -> Result<()> {
        let number = self.coming.pop_front().ok_or_else(|| WorkerError::internal("a unit that nobody asked for"))?;
        let front = self.front;
        let unit = &front.units[number];
        let arrived =
            |pending: PendingUpload<LoadedUnit>| pending.wait().map_err(|error| front.locate(error, unit, self.device));
        let (block, memory) = match loaded.and_then(arrived) {
            Ok(LoadedUnit { tensors, memory }) => {
                (Ok(self.at(unit, |at| at.block(unit, tensors, &front.tables))?), memory)
            }
            Err(error) => (Err(error), Vec::new()),
        };
        self.held.push_back(ResidentUnit { number, block, memory, passed: 0 });
        Ok(())
    }

    fn receive(&mut self, number: usize, wave: Wave) -> Result<()> {
        if wave.number == 0 && number > 0 && self.is_save_due() {
            self.gate = Some((number, Vec::new()));
        }
        match self.gate.take() {
            Some((gate, mut held)) if gate == number => {
                held.push(wave);
                if held.len() < self.front.waves {
                    self.gate = Some((gate, held));
                    return Ok(());
                }
                self.save(self.front.units[number].layer, &held);
                self.ready.entry(number).or_default().extend(held);
            }
            gate => {
                self.gate = gate;
                self.ready.entry(number).or_default().push_back(wave);
            }
        }
        Ok(())
    }

    fn is_save_due(&self) -> bool {
        lock(&self.front.save).as_ref().is_some_and(|points| points.is_due())
    }

    /// Saves the state while all waves wait before `layer`, once all earlier layers have been
    /// joined. None of `layer` has begun.
    fn save(&self, layer: usize, waves: &[Wave]) {
        let joined = self.clock.time(Work::Saving, || self.front.when(|passed| passed.next == layer).is_some());
        if !joined {
            return;
        }
        let (mut save, observer) = (lock(&self.front.save), lock(&self.front.observer));
        if let Some(points) = save.as_deref_mut() {
            self.clock.time(Work::Saving, || self.front.pass.save(points, layer, waves, &**observer));
        }
    }

    /// Moves the next wave through a loaded unit.
    fn step(&mut self, at: usize) -> Result<()> {
        let front = self.front;
        let mut held = self.held.remove(at).ok_or_else(|| WorkerError::internal("a unit that is not there"))?;
        let waves = self.ready.get_mut(&held.number);
        let mut wave = waves.and_then(VecDeque::pop_front).ok_or_else(|| WorkerError::internal("no wave waits"))?;
        let unit = &front.units[held.number];
        let block = held.block.as_ref().map_err(WorkerError::clone)?;
        self.at(unit, |at| at.pass(block, &mut wave))?;
        held.passed += 1;
        let (next, passed) = (held.number + 1, held.passed);
        if passed == front.waves {
            self.let_go(held)?;
        } else {
            self.held.insert(at, held);
        }
        match front.units.get(next) {
            Some(following) if following.layer == unit.layer => self.ready.entry(next).or_default().push_back(wave),
            following => {
                let device = following.map_or(0, |unit| front.device_of(unit.layer));
                wave.leave_for(&front.placement(device).device)?;
                front.send_on(next, wave);
            }
        }
        Ok(())
    }

    /// Releases a unit that all waves have passed.
    fn let_go(&mut self, ResidentUnit { number, block, memory, .. }: ResidentUnit) -> Result<()> {
        let front = self.front;
        let unit = &front.units[number];
        // These are views of memory that will be reused.
        drop(block);
        self.pool.give_back(memory);
        let release_fence = gpu::release_fence(&front.placement(self.device).device)?;
        // The loader is gone if there is nothing more to load.
        let _ = self.freed.send(PendingRelease { bytes: front.bytes(unit), release_fence });
        let ends_layer = front.units.get(number + 1).is_none_or(|next| next.layer > unit.layer);
        if ends_layer && let Some(seen) = self.seen.remove(&unit.layer) {
            // Before the last wave moves on, so that it is there when later layers have passed.
            lock(&front.passed).layers.insert(unit.layer, seen);
            front.changed.notify_all();
        }
        front.pass.progress.unit_done(unit, ends_layer, front.pass.model.source.bytes_read());
        Ok(())
    }

    /// Runs a function on a unit's layer, with the location added to errors.
    fn at<R>(
        &mut self,
        unit: &StreamingUnit,
        what: impl FnOnce(&mut LayerContext<'_, O::Layer>) -> Result<R>,
    ) -> Result<R> {
        let front = self.front;
        let seen = self.seen.entry(unit.layer).or_insert_with(|| lock(&front.observer).layer(unit.layer));
        let mut at = LayerContext {
            layer: unit.layer,
            spec: &front.pass.model.spec.layers[unit.layer],
            device: &front.placement(self.device).device,
            tokens: front.pass.tokens.tokens,
            batch_rows: front.pass.batch_rows(),
            masks: &front.masks[self.device],
            seen,
            clock: &self.clock,
        };
        what(&mut at).map_err(|error| front.locate(error, unit, self.device))
    }
}
