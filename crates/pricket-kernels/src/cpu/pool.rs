//! Threads of our own: asleep when there is nothing to do, and on the spot within a microsecond between two operations.
//!
//! A decode step is some two hundred short operations, each split over the same few threads. Workers wait for the next one
//! by looking at a counter, and sleep only when none has come for a tenth of a millisecond; the caller takes part, never
//! waits for a worker that has not woken, and runs alone where the pool is taken by another caller.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{OnceLock, PoisonError};

use sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use sync::thread::{self, JoinHandle};
use sync::{Arc, Condvar, Mutex};

/// Synchronization: the standard library's, or shuttle's in the model check of `tools/memory-check shuttle`.
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

/// Looks at the counter before a worker sleeps: about a tenth of a millisecond.
const LOOKS: usize = if cfg!(shuttle) { 1 } else { 2_000 };

/// Looks at a counter before a waiting caller lets another program have the processor.
const IMPATIENCE: usize = if cfg!(shuttle) { 0 } else { 20_000 };

thread_local! {
    static CURRENT: RefCell<Option<Pool>> = const { RefCell::new(None) };
    /// Whether this thread is inside of a task: what it starts runs on it alone.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A number of threads, the caller included. Cheap to clone; the threads end with the last clone.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
    _workers: Arc<Workers>,
}

struct Shared {
    threads: usize,
    /// Taken by the caller whose job it is.
    busy: AtomicBool,
    /// Odd while a job is open; counts up.
    ticket: AtomicUsize,
    /// Workers that are inside of the job.
    active: AtomicUsize,
    /// The next task that nobody has taken.
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
    /// Alive while the ticket is odd or a worker active.
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` is written by the holder of `busy` while no worker is active, and read by active workers.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is to something `Sync`.
unsafe impl Send for Shared {}

struct Workers {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.ring();
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

impl Pool {
    /// `threads` threads, the caller being one of them.
    ///
    /// # Errors
    /// If the system gives no more threads.
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
            workers.handles.push(worker.spawn(move || shared.serve())?);
        }
        Ok(Self { shared, _workers: Arc::new(workers) })
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Runs `f` on this thread, with every operation in it split over this pool.
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

    /// The pool of this thread: the one installed, else one of the machine's size that all such threads share.
    fn current() -> Self {
        static COMMON: OnceLock<Pool> = OnceLock::new();
        CURRENT.with_borrow(Option::clone).unwrap_or_else(|| {
            let all = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            // One thread can always be had: it is the caller.
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
    fn ring(&self) {
        let _guard = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        self.condvar.notify_all();
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes; the pointer is not followed after the job is closed, below.
        let run = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f) };
        // SAFETY: this caller holds `busy`, and no worker is active.
        unsafe { *self.job.get() = Some(Job { run, tasks }) };
        self.next.store(0, Ordering::SeqCst);
        self.ticket.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.ring();
        }
        let ours = catch_unwind(AssertUnwindSafe(|| self.take_tasks(tasks, f)));
        // Closed: who has not come is not waited for.
        self.ticket.fetch_add(1, Ordering::SeqCst);
        let mut looks = 0usize;
        while self.active.load(Ordering::SeqCst) > 0 {
            looks += 1;
            if looks < IMPATIENCE { std::hint::spin_loop() } else { thread::yield_now() }
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

    fn serve(&self) {
        let mut last = 0;
        while let Some(ticket) = self.wait_for_job(last) {
            last = ticket;
            self.active.fetch_add(1, Ordering::SeqCst);
            if self.ticket.load(Ordering::SeqCst) == ticket {
                // SAFETY: the caller closes the job and then waits until nobody is active before it lets go of it.
                let job = unsafe { *self.job.get() };
                if let Some(Job { run, tasks }) = job {
                    // SAFETY: while this worker is active, the caller waits, and with it what `run` borrows is alive.
                    let run = unsafe { &*run };
                    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.take_tasks(tasks, run))) {
                        *self.panicked.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
                    }
                }
            }
            self.active.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The ticket of an open job that is not `last`; `None` when the pool is closed.
    fn wait_for_job(&self, last: usize) -> Option<usize> {
        let open = || Some(self.ticket.load(Ordering::SeqCst)).filter(|&ticket| ticket % 2 == 1 && ticket != last);
        loop {
            for _ in 0..LOOKS {
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

/// Threads that [`parallel`] would use here.
pub fn threads() -> usize {
    if INSIDE.get() { 1 } else { Pool::current().threads() }
}

/// Runs `f` for every number below `tasks`, over the threads of the installed pool, in no particular order.
///
/// # Panics
/// If `f` does.
pub fn parallel(tasks: usize, f: impl Fn(usize) + Sync) {
    if tasks > 1 && !INSIDE.get() {
        let pool = Pool::current();
        if pool.threads() > 1 && !pool.shared.busy.swap(true, Ordering::Acquire) {
            return pool.shared.run(tasks, &f);
        }
    }
    (0..tasks).for_each(f);
}

/// Runs `f` over pieces of `size` elements of `data`, the last one perhaps shorter, each with its number.
pub(crate) fn parallel_chunks<T: Send>(data: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let (len, size) = (data.len(), size.max(1));
    let all = crate::cpu::shared::Shared::new(data);
    parallel(len.div_ceil(size), |i| {
        let from = i * size;
        // SAFETY: pieces do not overlap, and each is given to one task.
        f(i, unsafe { all.slice(from, size.min(len - from)) });
    });
}

/// `len` elements, made over the installed pool in pieces of `size`: `items` gives those of a piece, from the element of that
/// number on, and `done` is told when they are there.
///
/// # Panics
/// If a piece has too few of them.
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
    // SAFETY: every piece was filled, or a task has panicked and with it this.
    unsafe { out.set_len(len) };
    out
}

/// Zeros of a result, written over the installed pool where there are many: what was freed before is not zero any more.
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

/// Lends a buffer of this thread, which holds whatever the last borrower left. Borrowers within borrowers get their own.
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

/// Interleavings of callers and workers. Thread-local values are std's, which shuttle's threads share: jobs are run directly.
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
                            // No worker is left that could touch `seen` when it goes.
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
