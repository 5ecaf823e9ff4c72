//! Where the time of a pass on the CPU goes: the ops of a block, and the head, add what they have taken to a clock of
//! the thread that calls them.
//!
//! Reading the time twice costs an op some 50 ns, where the shortest takes microseconds. On a CUDA device ops return
//! before they are done, so they are not timed there.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// What a pass does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Finding outlier columns, and turning activations into codes.
    Quantize,
    /// The products of linear layers, with scales, outlier columns, biases, and what follows in the same pass:
    /// activation functions and residuals.
    Products,
    /// Queries over the keys and values in the cache.
    Attention,
    /// Writing keys and values to the cache.
    Cache,
    /// Layer norms.
    Norm,
    /// The product of the head, from hidden states to the logits.
    Head,
}

impl Part {
    /// Every part, in the order of [`Profile`].
    pub const ALL: [Self; 6] = [Self::Quantize, Self::Products, Self::Attention, Self::Cache, Self::Norm, Self::Head];
}

/// The time that each part has taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Profile([Duration; Part::ALL.len()]);

impl Profile {
    /// The time of one part.
    pub fn of(&self, part: Part) -> Duration {
        self.0[part as usize]
    }
}

thread_local! {
    static CLOCK: Cell<Profile> = const { Cell::new(Profile([Duration::ZERO; Part::ALL.len()])) };
    /// Whether a part is being timed.
    static IS_RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// What this thread's calls of ops have taken since it was last asked.
pub fn take() -> Profile {
    CLOCK.take()
}

/// Counts the time that `work` takes as that of a part; what ops take within it is not counted again.
pub fn time<T>(part: Part, work: impl FnOnce() -> T) -> T {
    /// Stops the clock, also when the work panics.
    struct Stop(Part, Instant);

    impl Drop for Stop {
        fn drop(&mut self) {
            IS_RUNNING.set(false);
            let mut profile = CLOCK.get();
            profile.0[self.0 as usize] += self.1.elapsed();
            CLOCK.set(profile);
        }
    }

    if IS_RUNNING.replace(true) {
        return work();
    }
    let _stop = Stop(part, Instant::now());
    work()
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;
    use std::thread::sleep;

    use super::*;

    #[test]
    fn the_outermost_part_counts_and_taking_starts_anew() {
        take();
        let nap = Duration::from_millis(2);
        time(Part::Head, || time(Part::Products, || sleep(nap)));
        time(Part::Norm, || sleep(nap));
        let panicked = catch_unwind(|| time(Part::Cache, || -> () { panic!("on purpose") }));
        assert!(panicked.is_err());
        time(Part::Products, || sleep(nap));
        let profile = take();
        for part in [Part::Head, Part::Norm, Part::Products] {
            assert!(profile.of(part) >= nap, "{part:?}");
        }
        assert_eq!(profile.of(Part::Attention), Duration::ZERO);
        assert_eq!(take(), Profile::default());
        for (index, part) in Part::ALL.into_iter().enumerate() {
            assert_eq!(part as usize, index);
        }
    }
}
