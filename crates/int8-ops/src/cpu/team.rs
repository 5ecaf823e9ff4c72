//! The threads that share a loop.
//!
//! A decode step is some hundred loops of 10 to 100 microseconds each with little between them, too
//! short for a thread to fall asleep and be woken every time. Here the others wait for the next loop
//! by spinning for a while, and a loop never waits for a thread that has not come: where the machine
//! is busy with something else, those that run do the work.
//!
//! Memory is read the fastest in order, so every thread walks along a stretch of the loop of its own,
//! and takes from the ends of other stretches only when it is through. Whatever it takes from, it takes
//! half of what is left: taking waits for all that is on its way from memory, so it should be rare, and
//! the last that is taken should be small, so that all threads end together. A thread that is stopped has
//! at most half of its stretch with it, which the others wait for.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};
use std::thread::{self, Thread};

/// Calls `work` with every part, from several threads where they are free: from one alone inside another
/// such loop, or while another caller's loop runs. Every thread's own parts follow one another; what it takes
/// from others comes from their ends.
pub(crate) fn for_each<T: Send>(parts: Vec<T>, work: impl Fn(T) + Sync) {
    if parts.len() < 2 {
        return parts.into_iter().for_each(work);
    }
    let parts: Vec<Mutex<Option<T>>> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
    let take = |index: usize| parts[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    for_each_range(parts.len(), 1, |indices| indices.filter_map(take).for_each(&work));
}

/// The same for the parts of `size` that 0..len falls into, the last of which may be shorter: `work` is called with
/// ranges of at least one part, which cover them all.
pub(crate) fn for_each_range(len: usize, size: usize, work: impl Fn(Range<usize>) + Sync) {
    let count = len.div_ceil(size);
    if count == 0 {
        return;
    }
    let work = |parts: Range<usize>| work(parts.start * size..len.min(parts.end * size));
    let team = TEAM.get_or_init(Team::start);
    let caller = match team.callers.try_lock() {
        Err(TryLockError::WouldBlock) => None,
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Ok(caller) => Some(caller),
    };
    match caller {
        Some(caller) if count > 1 && count <= u32::MAX as usize && !team.members.is_empty() => {
            team.run(count as u32, &work, caller)
        }
        _ => work(0..count),
    }
}

/// As many threads as rayon has, so that one setting counts for both.
static TEAM: OnceLock<&'static Team> = OnceLock::new();

/// How often a thread looks for work before it sleeps: about a quarter of a millisecond.
const SPINS: u32 = 10_000;

struct Team {
    members: Vec<Member>,
    /// What is left of every thread's stretch of the loop, the caller's first.
    stretches: Vec<Stretch>,
    /// Whether a loop may be joined (`OPEN`), which one (the bits above), and how many of the members
    /// are in it (the bits below).
    door: AtomicU64,
    /// What the loop does; written while the door is closed and nobody is inside.
    job: UnsafeCell<Option<Job>>,
    /// What a member's work panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    callers: Mutex<()>,
}

// SAFETY: `job` is written by the one that holds `callers`, before it opens the door, and read only by
// those who went through the open door and by whom the caller waits.
unsafe impl Sync for Team {}

/// Indices from a first one, in the bits below, to an end, in the bits above; on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Stretch(AtomicU64);

impl Stretch {
    fn set(&self, indices: Range<u32>) {
        self.0.store(u64::from(indices.end) << 32 | u64::from(indices.start), Ordering::Relaxed);
    }

    /// The first half of what is left.
    fn take_first(&self) -> Option<Range<u32>> {
        self.take(|left| {
            let middle = left.start + (left.end - left.start).div_ceil(2);
            (left.start..middle, middle..left.end)
        })
    }

    /// The last half of what is left.
    fn take_last(&self) -> Option<Range<u32>> {
        self.take(|left| {
            let middle = left.start + (left.end - left.start) / 2;
            (middle..left.end, left.start..middle)
        })
    }

    /// Splits what is left into what is taken and what is left then.
    fn take(&self, split: impl Fn(Range<u32>) -> (Range<u32>, Range<u32>)) -> Option<Range<u32>> {
        let mut held = self.0.load(Ordering::Relaxed);
        loop {
            let (first, end) = (held as u32, (held >> 32) as u32);
            if first >= end {
                return None;
            }
            let (taken, left) = split(first..end);
            let left = u64::from(left.end) << 32 | u64::from(left.start);
            match self.0.compare_exchange_weak(held, left, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken),
                Err(other) => held = other,
            }
        }
    }
}

struct Member {
    thread: Thread,
    is_asleep: &'static AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    work: &'static (dyn Fn(Range<usize>) + Sync),
}

const OPEN: u64 = 1 << 31;
const NEXT_LOOP: u64 = 1 << 32;
const INSIDE: u64 = OPEN - 1;

impl Team {
    fn start() -> &'static Self {
        let members: Vec<_> = (1..rayon::current_num_threads()).map_while(Member::start).collect();
        let team = Self {
            stretches: (0..=members.len()).map(|_| Stretch::default()).collect(),
            members,
            door: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            callers: Mutex::new(()),
        };
        // It lives as long as the program, as its threads do.
        Box::leak(Box::new(team))
    }

    fn run(&self, count: u32, work: &(dyn Fn(Range<usize>) + Sync), _caller: MutexGuard<()>) {
        // SAFETY: only the lifetime is changed; `Closing` sees to it that nobody works after this call.
        let work: &'static (dyn Fn(Range<usize>) + Sync) = unsafe { std::mem::transmute(work) };
        // Of an earlier loop, whose caller panicked too and never came to look.
        *self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
        // SAFETY: the door is closed and nobody is inside, so nobody reads the job.
        unsafe { *self.job.get() = Some(Job { work }) };
        let threads = self.stretches.len();
        let border = |thread: usize| (u64::from(count) * thread as u64 / threads as u64) as u32;
        for (thread, stretch) in self.stretches.iter().enumerate() {
            stretch.set(border(thread)..border(thread + 1));
        }
        // Sequentially consistent with the member who says that it sleeps and then looks at the door.
        self.door.fetch_add(NEXT_LOOP | OPEN, Ordering::SeqCst);
        let closing = Closing(self);
        for member in &self.members {
            if member.is_asleep.load(Ordering::SeqCst) && member.is_asleep.swap(false, Ordering::SeqCst) {
                member.thread.unpark();
            }
        }
        self.work_on(Job { work }, 0);
        drop(closing);
        let panic = self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Works along the thread's own stretch, and then on what others have not come to yet.
    fn work_on(&self, job: Job, thread: usize) {
        while let Some(parts) = self.stretches[thread].take_first() {
            (job.work)(parts.start as usize..parts.end as usize);
        }
        for other in (0..self.stretches.len()).filter(|&other| other != thread) {
            while let Some(parts) = self.stretches[other].take_last() {
                (job.work)(parts.start as usize..parts.end as usize);
            }
        }
    }

    /// What a member does all its life.
    fn serve(&self, thread: usize, is_asleep: &AtomicBool) -> ! {
        let mut last = 0;
        loop {
            let seen = self.wait_for_open_door(last, is_asleep);
            last = seen / NEXT_LOOP;
            if self.door.compare_exchange(seen, seen + 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
                // Somebody else came or went, or the loop is over: look again.
                last = last.wrapping_sub(1);
                continue;
            }
            // SAFETY: the door was open, so the job is written, and the caller waits for this thread to leave.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work_on(job, thread)))
            {
                *self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(panic);
            }
            self.door.fetch_sub(1, Ordering::Release);
        }
    }

    /// The door's state when it is open for a loop other than `last`.
    fn wait_for_open_door(&self, last: u64, is_asleep: &AtomicBool) -> u64 {
        let mut spins = 0;
        loop {
            let state = self.door.load(Ordering::SeqCst);
            if state & OPEN != 0 && state / NEXT_LOOP != last {
                is_asleep.store(false, Ordering::Relaxed);
                return state;
            }
            spins += 1;
            if spins < SPINS {
                spin_loop();
            } else if spins == SPINS {
                // Said first, then looked once more: a caller who opens the door later wakes this thread.
                is_asleep.store(true, Ordering::SeqCst);
            } else {
                thread::park();
                spins = 0;
            }
        }
    }
}

impl Member {
    /// Starts thread `thread`, the caller being 0; None when the system gives no more: fewer do the work.
    fn start(thread: usize) -> Option<Self> {
        let is_asleep: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let serve = move || TEAM.wait().serve(thread, is_asleep);
        let thread = thread::Builder::new().name("llm8-team".to_string()).spawn(serve).ok()?;
        Some(Self { thread: thread.thread().clone(), is_asleep })
    }
}

/// Ends a loop: closes the door and waits until all have left, also when the caller's own work panics.
struct Closing<'a>(&'a Team);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.stretches.iter().for_each(|stretch| stretch.set(0..0));
        self.0.door.fetch_and(!OPEN, Ordering::AcqRel);
        while self.0.door.load(Ordering::Acquire) & INSIDE != 0 {
            spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn every_part_is_worked_on_once_also_from_several_callers_and_inside_another_loop() {
        let counts: Vec<AtomicU32> = (0..200).map(|_| AtomicU32::new(0)).collect();
        let loops = || {
            for _ in 0..200 {
                for_each((0..20).collect(), |outer: usize| {
                    for_each((0..10).collect(), |inner: usize| {
                        counts[10 * outer + inner].fetch_add(1, Ordering::Relaxed);
                    });
                });
            }
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(loops);
            }
        });
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 600));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_next_loop_runs() {
        for bad in 0..8 {
            let panicked =
                catch_unwind(|| for_each((0..8).collect(), |part: usize| assert_ne!(part, bad, "on purpose")));
            assert!(panicked.is_err());
            let done = AtomicU32::new(0);
            for_each((0..8).collect(), |_: usize| _ = done.fetch_add(1, Ordering::Relaxed));
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn a_loop_in_which_every_thread_panics_leaves_nothing_for_the_next() {
        for _ in 0..20 {
            let (came, start) = (AtomicU32::new(0), Instant::now());
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                for_each(vec![(); 8], |()| {
                    came.fetch_add(1, Ordering::Relaxed);
                    // Two threads panic in one loop, where there are two and both come.
                    while came.load(Ordering::Relaxed) < 2 && start.elapsed() < Duration::from_millis(20) {
                        spin_loop();
                    }
                    panic!("on purpose");
                });
            }));
            assert!(panicked.is_err());
            let done = AtomicU32::new(0);
            for_each(vec![(); 8], |()| _ = done.fetch_add(1, Ordering::Relaxed));
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn ranges_of_any_size_cover_every_index_once() {
        for len in [0, 1, 2, 5, 64, 1003] {
            for size in [1, 2, 3, 7, 63, 64, 65, 1002, 1003, 1004, 5000] {
                let counts: Vec<AtomicU32> = (0..len).map(|_| AtomicU32::new(0)).collect();
                for_each_range(len, size, |range| {
                    assert!(range.start % size == 0 && (range.end % size == 0 || range.end == len), "{range:?}");
                    assert!(!range.is_empty());
                    counts[range].iter().for_each(|count| _ = count.fetch_add(1, Ordering::Relaxed));
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{len} by {size}");
            }
        }
    }
}
