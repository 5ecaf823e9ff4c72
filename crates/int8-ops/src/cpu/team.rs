//! The threads that share a loop.
//!
//! A decode step is some hundred loops of 10 to 100 microseconds each with little between them, too
//! short for a thread to fall asleep and be woken every time. Here the others wait for the next loop
//! by spinning for a while, and a loop never waits for a thread that has not come: where the machine
//! is busy with something else, those that run do the work.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};
use std::thread::{self, Thread};

/// Calls `work` with every part, from several threads where they are free: from one alone inside another
/// such loop, or while another caller's loop runs. Parts are handed out in order, one at a time.
pub(crate) fn for_each<T: Send>(parts: Vec<T>, work: impl Fn(T) + Sync) {
    let team = TEAM.get_or_init(Team::start);
    let caller = match team.callers.try_lock() {
        Err(TryLockError::WouldBlock) => None,
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Ok(caller) => Some(caller),
    };
    match caller {
        Some(caller) if parts.len() > 1 && !team.members.is_empty() => {
            let parts: Vec<Mutex<Option<T>>> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
            let take = |index: usize| parts[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            team.run(parts.len(), &|index| take(index).into_iter().for_each(&work), caller)
        }
        _ => parts.into_iter().for_each(work),
    }
}

/// As many threads as rayon has, so that one setting counts for both.
static TEAM: OnceLock<&'static Team> = OnceLock::new();

/// How often a thread looks for work before it sleeps: about a quarter of a millisecond.
const SPINS: u32 = 10_000;

struct Team {
    members: Vec<Member>,
    /// Whether a loop may be joined (`OPEN`), which one (the bits above), and how many of the members
    /// are in it (the bits below).
    door: AtomicU64,
    /// What the loop does; written while the door is closed and nobody is inside.
    job: UnsafeCell<Option<Job>>,
    /// The next index to hand out.
    next: AtomicUsize,
    /// What a member's work panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    callers: Mutex<()>,
}

// SAFETY: `job` is written by the one that holds `callers`, before it opens the door, and read only by
// those who went through the open door and by whom the caller waits.
unsafe impl Sync for Team {}

struct Member {
    thread: Thread,
    is_asleep: &'static AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    count: usize,
    work: &'static (dyn Fn(usize) + Sync),
}

const OPEN: u64 = 1 << 31;
const NEXT_LOOP: u64 = 1 << 32;
const INSIDE: u64 = OPEN - 1;

impl Team {
    fn start() -> &'static Self {
        let members = (1..rayon::current_num_threads()).map_while(|_| Member::start()).collect();
        let team = Self {
            members,
            door: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            callers: Mutex::new(()),
        };
        // It lives as long as the program, as its threads do.
        Box::leak(Box::new(team))
    }

    fn run(&self, count: usize, work: &(dyn Fn(usize) + Sync), _caller: MutexGuard<()>) {
        // SAFETY: only the lifetime is changed; `Closing` sees to it that nobody works after this call.
        let work: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
        // SAFETY: the door is closed and nobody is inside, so nobody reads the job.
        unsafe { *self.job.get() = Some(Job { count, work }) };
        self.next.store(0, Ordering::Relaxed);
        // Sequentially consistent with the member who says that it sleeps and then looks at the door.
        self.door.fetch_add(NEXT_LOOP | OPEN, Ordering::SeqCst);
        let closing = Closing(self);
        for member in &self.members {
            if member.is_asleep.load(Ordering::SeqCst) && member.is_asleep.swap(false, Ordering::SeqCst) {
                member.thread.unpark();
            }
        }
        self.work_on(Job { count, work });
        drop(closing);
        let panic = self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    fn work_on(&self, job: Job) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= job.count {
                return;
            }
            (job.work)(index);
        }
    }

    /// What a member does all its life.
    fn serve(&self, is_asleep: &AtomicBool) -> ! {
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
                && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work_on(job)))
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
    /// None when the system gives no more threads: the work is done by fewer.
    fn start() -> Option<Self> {
        let is_asleep: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
        let serve = move || TEAM.wait().serve(is_asleep);
        let thread = thread::Builder::new().name("llm8-team".to_string()).spawn(serve).ok()?;
        Some(Self { thread: thread.thread().clone(), is_asleep })
    }
}

/// Ends a loop: closes the door and waits until all have left, also when the caller's own work panics.
struct Closing<'a>(&'a Team);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.next.fetch_max(usize::MAX / 2, Ordering::Relaxed);
        self.0.door.fetch_and(!OPEN, Ordering::AcqRel);
        while self.0.door.load(Ordering::Acquire) & INSIDE != 0 {
            spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

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
}
