//! A thread pool with low latency for short operations.
//!
//! A decode step is about two hundred short operations, each split over the same few threads. Between operations,
//! workers spin on a counter and so begin within a microsecond. They sleep if no operation arrives for a tenth of a
//! millisecond. The caller works on the tasks too, and does not wait for sleeping workers. If another caller has the
//! pool, it runs all tasks by itself.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{OnceLock, PoisonError};

use sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use sync::thread::{self, JoinHandle};
use sync::{Arc, Condvar, Mutex};

/// Synchronization primitives: the standard library's, or shuttle's in the model check of `tools/memory-check shuttle`.
mod sync {
    #[cfg(shuttle)]
    pub(super) use shuttle::{
        sync::{Arc, Condvar, Mutex, atomic},
        thread,
    };
    #[cfg(not(shuttle))]
    pub(super) use std::{
        sync::{Arc, Condvar, Mutex, atomic},
        thread,
    };
}

/// Number of times that a worker reads the counter before it sleeps: about a tenth of a millisecond.
const SPINS_BEFORE_SLEEP: usize = if cfg!(shuttle) { 1 } else { 2_000 };

/// Number of times that a waiting caller reads a counter before it yields the processor.
const SPINS_BEFORE_YIELD: usize = if cfg!(shuttle) { 0 } else { 20_000 };

thread_local! {
    static CURRENT: RefCell<Option<Pool>> = const { RefCell::new(None) };
    /// Whether this thread runs a task. Nested operations then run on this thread alone.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A pool of threads, including the caller. Cheap to clone; the threads end with the last clone.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
    _workers: Arc<Workers>,
    fixed_order: bool,
}

struct Shared {
    threads: usize,
    /// Set by the caller that runs a job.
    busy: AtomicBool,
    /// Odd while a job is open; counts up.
    ticket: AtomicUsize,
    /// Number of workers in the job.
    active: AtomicUsize,
    /// The next task to take.
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    panicked: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    sleepers: AtomicUsize,
    mutex: Mutex<()>,
    condvar: Condvar,
    closed: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    /// Valid while the ticket is odd or a worker is active.
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` is written by the holder of `busy` while no worker is active, and is read by active workers.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` points to a `Sync` value.
unsafe impl Send for Shared {}

struct Workers {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.wake_workers();
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

impl Pool {
    /// Creates a pool of `threads` threads (at least 1), including the caller.
    ///
    /// # Errors
    /// Returns an error if the system cannot start the threads.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            threads,
            busy: AtomicBool::new(false),
            ticket: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panicked: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            mutex: Mutex::new(()),
            condvar: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        let mut workers = Workers { shared: Arc::clone(&shared), handles: Vec::new() };
        for i in 1..threads {
            let shared = Arc::clone(&shared);
            let worker = thread::Builder::new().name(format!("pricket-{i}"));
            workers.handles.push(worker.spawn(move || shared.worker_loop())?);
        }
        Ok(Self { shared, _workers: Arc::new(workers), fixed_order: false })
    }

    /// Fixes the order of summation in products and attention, so that a row of activations gives the same bits alone
    /// and among any other rows.
    ///
    /// Without a fixed order, kernels for few rows and for many rows add the same numbers in different orders. With
    /// one, all products use the kernels for many rows, which are slower for a few rows, and activations are not
    /// rounded to bfloat16 ([`ActivationPrecision::BF16`](crate::ActivationPrecision::BF16) acts as `F32`). The threads
    /// stay shared with `self`.
    #[must_use]
    pub fn with_fixed_order(self) -> Self {
        Self { fixed_order: true, ..self }
    }

    /// Returns the number of threads, including the caller.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Runs `f` on this thread and splits the operations in it over this pool.
    pub fn install<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Restore(Option<Pool>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let _restore = Restore(CURRENT.replace(Some(self.clone())));
        f()
    }

    /// Returns the pool installed on this thread, or else a common pool with a thread for each available processor.
    fn current() -> Self {
        static COMMON: OnceLock<Pool> = OnceLock::new();
        CURRENT.with_borrow(Option::clone).unwrap_or_else(|| {
            let all = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            // A pool of one always works: its thread is the caller.
            let make = || Pool::new(all()).or_else(|_| Pool::new(1)).expect("a pool of one starts no thread");
            COMMON.get_or_init(make).clone()
        })
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.shared.threads)
    }
}

impl Shared {
    fn wake_workers(&self) {
        let _guard = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        self.condvar.notify_all();
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes; the pointer is not used after the job is closed, below.
        let run = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f) };
        // SAFETY: this caller holds `busy`, and no worker is active.
        unsafe { *self.job.get() = Some(Job { run, tasks }) };
        self.next.store(0, Ordering::SeqCst);
        self.ticket.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake_workers();
        }
        let ours = catch_unwind(AssertUnwindSafe(|| self.take_tasks(tasks, f)));
        // The job is closed: workers that have not joined it are not waited for.
        self.ticket.fetch_add(1, Ordering::SeqCst);
        let mut looks = 0usize;
        while self.active.load(Ordering::SeqCst) > 0 {
            looks += 1;
            if looks < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let theirs = self.panicked.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.busy.store(false, Ordering::Release);
        if let Some(payload) = ours.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    fn take_tasks(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        struct Out;
        impl Drop for Out {
            fn drop(&mut self) {
                INSIDE.set(false);
            }
        }
        INSIDE.set(true);
        let _out = Out;
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            f(task);
        }
    }

    fn worker_loop(&self) {
        let mut last = 0;
        while let Some(ticket) = self.wait_for_job(last) {
            last = ticket;
            self.active.fetch_add(1, Ordering::SeqCst);
            if self.ticket.load(Ordering::SeqCst) == ticket {
                // SAFETY: the caller closes the job and waits until no worker is active before it reuses the job.
                let job = unsafe { *self.job.get() };
                if let Some(Job { run, tasks }) = job {
                    // SAFETY: while this worker is active, the caller waits, which keeps alive what `run` borrows.
                    let run = unsafe { &*run };
                    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.take_tasks(tasks, run))) {
                        *self.panicked.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
                    }
                }
            }
            self.active.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits for an open job other than `last` and returns its ticket. Returns `None` when the pool closes.
    fn wait_for_job(&self, last: usize) -> Option<usize> {
        let open = || Some(self.ticket.load(Ordering::SeqCst)).filter(|&ticket| ticket % 2 == 1 && ticket != last);
        loop {
            for _ in 0..SPINS_BEFORE_SLEEP {
                if let Some(ticket) = open() {
                    return Some(ticket);
                }
                std::hint::spin_loop();
            }
            let guard = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let asleep = |(): &mut ()| open().is_none() && !self.closed.load(Ordering::SeqCst);
            drop(self.condvar.wait_while(guard, asleep).unwrap_or_else(PoisonError::into_inner));
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            if self.closed.load(Ordering::SeqCst) {
                return None;
            }
        }
    }
}

/// Returns the number of threads that [`parallel`] would use on this thread.
pub fn threads() -> usize {
    if INSIDE.get() { 1 } else { Pool::current().threads() }
}

/// Returns whether the installed pool fixes the order of summation; see [`Pool::with_fixed_order`].
pub(crate) fn order_is_fixed() -> bool {
    CURRENT.with_borrow(|pool| pool.as_ref().is_some_and(|pool| pool.fixed_order))
}

/// Runs `f` for every number below `tasks`, on the threads of the installed pool, in no particular order.
///
/// # Panics
/// If `f` panics.
pub fn parallel(tasks: usize, f: impl Fn(usize) + Sync) {
    if tasks > 1 && !INSIDE.get() {
        let pool = Pool::current();
        if pool.threads() > 1 && !pool.shared.busy.swap(true, Ordering::Acquire) {
            return pool.shared.run(tasks, &f);
        }
    }
    (0..tasks).for_each(f);
}

/// Runs `f` on pieces of `size` elements of `data`, each with its number. The last piece may be shorter.
pub(crate) fn parallel_chunks<T: Send>(data: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let (len, size) = (data.len(), size.max(1));
    let all = crate::cpu::shared::Shared::new(data);
    parallel(len.div_ceil(size), |i| {
        let from = i * size;
        // SAFETY: the pieces do not overlap, and each belongs to one task.
        f(i, unsafe { all.slice(from, size.min(len - from)) });
    });
}

/// Returns `f(i)` for every number `i` below `len`, computed on the installed pool.
pub fn map<T: Send>(len: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut out: Vec<Option<T>> = std::iter::repeat_with(|| None).take(len).collect();
    parallel_chunks(&mut out, 1, |i, out| out[0] = Some(f(i)));
    out.into_iter().flatten().collect()
}

/// Collects `len` elements, computed on the installed pool in pieces of `size`.
///
/// `items(i)` returns the elements of a piece, from element `i` on. `done` is called with the number of each piece when
/// it is complete.
///
/// # Panics
/// If `items` returns too few elements for a piece.
pub fn collect<T: Copy + Send, I: Iterator<Item = T>>(
    len: usize,
    size: usize,
    items: impl Fn(usize) -> I + Sync,
    done: impl Fn(usize) + Sync,
) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    parallel_chunks(&mut out.spare_capacity_mut()[..len], size, |i, out| {
        let (wanted, mut made) = (out.len(), 0);
        for (out, item) in out.iter_mut().zip(items(i * size)) {
            out.write(item);
            made += 1;
        }
        assert_eq!(made, wanted, "a piece has too few elements");
        done(i);
    });
    // SAFETY: every piece is filled here; if a task panics, so does this thread.
    unsafe { out.set_len(len) };
    out
}

/// Returns zeros for a result. Large results are zeroed on the installed pool, because reused memory has to be cleared.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    const PIECE: usize = 64 << 10;
    if len < 2 * PIECE {
        return vec![0.0; len];
    }
    collect(len, PIECE, |_| std::iter::repeat(0.0), |_| ())
}

thread_local! {
    static SCRATCH: Cell<Vec<Vec<f32>>> = const { Cell::new(Vec::new()) };
}

/// Calls `f` with a buffer of this thread. The buffer holds the numbers of its last user; nested calls get different
/// buffers.
pub(crate) fn scratch<R>(f: impl FnOnce(&mut Vec<f32>) -> R) -> R {
    let mut free = SCRATCH.take();
    let mut buffer = free.pop().unwrap_or_default();
    SCRATCH.set(free);
    let result = f(&mut buffer);
    let mut free = SCRATCH.take();
    free.push(buffer);
    SCRATCH.set(free);
    result
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads).unwrap();
            pool.install(|| {
                for tasks in [0, 1, 2, 3, 100] {
                    for _ in 0..300 {
                        let seen: Vec<AtomicU64> = (0..tasks).map(|_| AtomicU64::new(0)).collect();
                        parallel(tasks, |i| {
                            seen[i].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
                    }
                }
            });
        }
    }

    #[test]
    fn callers_share_a_pool_and_tasks_may_start_tasks() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    pool.install(|| {
                        for _ in 0..200 {
                            parallel(8, |i| {
                                parallel(4, |j| {
                                    sum.fetch_add((i * j) as u64, Ordering::Relaxed);
                                });
                            });
                        }
                    });
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4 * 200 * 28 * 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2).unwrap();
        pool.install(|| {
            for bad in 0..4 {
                let caught = catch_unwind(|| parallel(4, |i| assert_ne!(i, bad, "task {bad}")));
                assert!(caught.is_err());
                let count = AtomicU64::new(0);
                parallel(4, |_| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(count.load(Ordering::Relaxed), 4);
            }
        });
    }
}

/// Checks interleavings of callers and workers. Thread-local values are the standard library's, which shuttle's threads
/// share, so jobs are run directly.
#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;

    #[test]
    fn every_task_runs_once_and_the_job_is_over_when_its_caller_returns() {
        let round = || {
            let pool = Pool::new(3).unwrap();
            let callers: Vec<_> = (0..2)
                .map(|_| {
                    let shared = Arc::clone(&pool.shared);
                    thread::spawn(move || {
                        for tasks in [2usize, 3] {
                            if shared.busy.swap(true, Ordering::SeqCst) {
                                continue;
                            }
                            let seen: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                            shared.run(tasks, &|i| {
                                seen[i].fetch_add(1, Ordering::SeqCst);
                            });
                            // No worker can still access `seen` when it is dropped.
                            assert!(seen.iter().all(|count| count.load(Ordering::SeqCst) == 1));
                        }
                    })
                })
                .collect();
            callers.into_iter().for_each(|caller| caller.join().unwrap());
            drop(pool);
        };
        shuttle::check_random(round, 5_000);
        shuttle::check_pct(round, 5_000, 3);
    }
}
