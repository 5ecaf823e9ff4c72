//! The element-wise kernels: plain loops, inlined into every instruction set's table and vectorised for
//! it there. The loops themselves stand in `portable`.

/// Makes a module `elementwise` whose table `KERNELS` holds the element-wise kernels compiled for the
/// given features; its other entries are those of `portable`.
macro_rules! elementwise_kernels {
    ($features:literal) => {
        mod elementwise {
            use std::mem::MaybeUninit;

            use super::super::portable::{self, BlockScales, Bound, Finish, KEYS_PER_BLOCK, Query, RunningSoftmax};
            use super::super::Kernels;

            $crate::cpu::elementwise::compiled_for!($features:
                absmax(x: &[f32], threshold: Option<f32>) -> f32;
                flag_outliers(x: &[f32], threshold: f32, flags: &mut [u8]) -> ();
                quantize(x: &[f32], inverse: f32, codes: &mut [i8]) -> ();
                sum_codes(codes: &[i8]) -> i32;
                gather_columns(weight: &[i8], cols: usize, columns: &[u32], gathered: &mut [f32]) -> ();
                finish(sums: &[i32], outlier_weights: &[f32], with: &Finish, out: &mut [MaybeUninit<f32>]) -> ();
                softmax_block(scores: &mut [f32], seen: usize, slope: f32, first_key: usize, softmax: &mut RunningSoftmax) -> f32;
                int16_codes(x: &[f32], bound: Bound, codes: &mut [i16]) -> f32;
                softmax_codes(sums: &[[i32; KEYS_PER_BLOCK]], block: &BlockScales, queries: &mut [Query], weights: &mut [[f32; KEYS_PER_BLOCK]], codes: &mut [[i16; KEYS_PER_BLOCK]]) -> ();
                shrink_and_add(context: &mut [f32], shrink: f32, sums: &[i32], scale: f32) -> ();
                layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) -> ();
                add(x: &mut [f32], other: &[f32]) -> ();
                relu(x: &mut [f32]) -> ();
                gelu(x: &mut [f32]) -> ();
                gelu_erf(x: &mut [f32]) -> ();
            );
        }
    };
}

macro_rules! compiled_for {
    ($features:literal: $($name:ident($($arg:ident: $type:ty),*) -> $out:ty;)*) => {
        // SAFETY: the table is handed out only where the features have been found.
        #[allow(clippy::undocumented_unsafe_blocks)]
        pub(super) const KERNELS: Kernels = Kernels {
            $($name: |$($arg),*| unsafe { $name($($arg),*) },)*
            ..portable::KERNELS
        };
        $(
            #[target_feature(enable = $features)]
            fn $name($($arg: $type),*) -> $out {
                portable::$name($($arg),*)
            }
        )*
    };
}

pub(super) use {compiled_for, elementwise_kernels};
