//! One linear layer at int8, 16 and 32 bits: `cargo bench -p int8-ops`.
//!
//! Square weights of width 1024 and 4096, 1 token (decoding) and 128 tokens (a prompt); one column of
//! the activations is an outlier, so that the decomposition has something to do.

use std::hint::black_box;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Module;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use int8_ops::{FloatLinear, Int8Linear, Int8Matrix, OUTLIER_THRESHOLD};

fn activations(tokens: usize, width: usize) -> Result<Tensor> {
    let mut values = Tensor::randn(0f32, 1.0, (tokens, width), &Device::Cpu)?.clamp(-5.0, 5.0)?.to_vec2::<f32>()?;
    values[0][width / 3] = 20.0;
    Tensor::new(values, &Device::Cpu)
}

fn linear(criterion: &mut Criterion) -> Result<()> {
    for width in [1024, 4096] {
        let weight = Tensor::randn(0f32, 0.02, (width, width), &Device::Cpu)?;
        let matrix = Int8Matrix::quantize(&weight)?;
        let layers: [(&str, Box<dyn Module>); 5] = [
            ("int8", Box::new(Int8Linear::new(matrix.clone(), None, Some(OUTLIER_THRESHOLD))?)),
            ("int8-no-outliers", Box::new(Int8Linear::new(matrix, None, None)?)),
            ("f16", Box::new(FloatLinear::new(weight.to_dtype(DType::F16)?, None)?)),
            ("bf16", Box::new(FloatLinear::new(weight.to_dtype(DType::BF16)?, None)?)),
            ("f32", Box::new(FloatLinear::new(weight, None)?)),
        ];
        for tokens in [1, 128] {
            let x = activations(tokens, width)?;
            let mut group = criterion.benchmark_group(format!("linear-{width}-{tokens}-tokens"));
            group.throughput(Throughput::Elements((tokens * width * width) as u64));
            for (name, layer) in &layers {
                group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                    bencher.iter(|| layer.forward(black_box(&x)).expect("the shapes fit"));
                });
            }
            group.finish();
        }
    }
    Ok(())
}

fn all(criterion: &mut Criterion) {
    linear(criterion).expect("the layers are made and run");
}

criterion_group!(benches, all);
criterion_main!(benches);
