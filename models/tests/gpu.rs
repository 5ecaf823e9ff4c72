//! Ops and models on an NVIDIA GPU against the same on the CPU. `make gpu` runs them.
#![cfg(feature = "cuda")]

mod support;

use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Module;
use int8_models::{CacheDtype, CausalLm, GenerateOptions, LoadOptions, Loaded, ModelFolder, Precision, generate, load};
use int8_ops::{
    Activation, AttentionCache, FloatLinear, Fused, Int8Linear, Int8LinearGroup, Int8Matrix, LayerNorm,
    OUTLIER_THRESHOLD, add, attention,
};
use support::*;

const MODELS: [&str; 4] = ["tiny-bloom", "tiny-bloom-outliers", "tiny-opt", "tiny-opt-outliers"];

/// Dtypes of activations, and how much of the largest output one rounding to them may move.
const DTYPES: [(DType, f32); 3] = [(DType::F32, 1e-5), (DType::F16, 1e-3), (DType::BF16, 8e-3)];

fn gpu() -> Device {
    int8_ops::device::cuda(0).unwrap()
}

/// Other values in every run; the seed is printed, so that a failure can be looked at.
fn seeded() {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    fastrand::seed(seed);
}

/// (dims) of values within ±`range`, one in a thousand of them an outlier, in `dtype` on the CPU.
fn random(dims: &[usize], range: f32, dtype: DType) -> Result<Tensor> {
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| match fastrand::u32(0..1000) {
            0 => 40.0 * (fastrand::f32() - 0.5),
            _ => 2.0 * range * (fastrand::f32() - 0.5),
        })
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)
}

fn check(label: &str, found: &Tensor, wanted: &Tensor, tolerance: f32) {
    let error = relative_error(&found.to_device(&Device::Cpu).unwrap(), wanted);
    assert!(error <= tolerance, "{label}: {error}");
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn weights_have_the_codes_of_the_cpu() -> Result<()> {
    seeded();
    for (rows, cols) in [(1, 1), (7, 33), (130, 1024), (64, 4099), (20, 57_344)] {
        for (dtype, _) in DTYPES {
            let weight = random(&[rows, cols], 1.0, dtype)?;
            let (found, wanted) = (Int8Matrix::quantize(&weight.to_device(&gpu())?)?, Int8Matrix::quantize(&weight)?);
            let codes = |matrix: &Int8Matrix| matrix.codes()?.flatten_all()?.to_device(&Device::Cpu)?.to_vec1::<u8>();
            assert_eq!(codes(&found)?, codes(&wanted)?, "({rows}, {cols}) {dtype:?}");
            assert_eq!(found.scales().to_vec1::<f32>()?, wanted.scales().to_vec1::<f32>()?);
        }
    }
    let bad = Tensor::new(&[[1f32, 2.0], [f32::NAN, 1.0]], &gpu())?;
    assert!(Int8Matrix::quantize(&bad).unwrap_err().to_string().contains("value [1, 0] is NaN"));
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn products_are_those_of_the_cpu() -> Result<()> {
    seeded();
    let device = gpu();
    let shapes = [(768, 768), (1000, 250), (1024, 4096), (4096, 1024), (33, 17), (1027, 131), (16_384, 256)];
    for (cols, rows) in shapes {
        check_products(&device, cols, rows, &[(1, 1), (8, 1), (2, 4), (1, 13), (3, 50), (1, 300)])?;
    }
    // As many outputs as one token's pieces come round for, and the larger tiles are for.
    check_products(&device, 4096, 16_384, &[(1, 1)])?;
    check_products(&device, 512, 4096, &[(1, 500)])?;
    check_products(&device, 512, 8192, &[(1, 1100), (3, 400)])?;
    check_products(&device, 333, 8200, &[(1, 1100)])
}

/// Few enough for compute-sanitizer, every kernel among them.
#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn small_products_are_those_of_the_cpu() -> Result<()> {
    seeded();
    let device = gpu();
    check_products(&device, 250, 70, &[(1, 1), (2, 4), (1, 13), (2, 35)])?;
    check_products(&device, 512, 300, &[(1, 1), (8, 1), (3, 5), (1, 70)])
}

/// x (sequences, tokens, cols), in every dtype, times a weight (rows, cols).
fn check_products(device: &Device, cols: usize, rows: usize, sizes: &[(usize, usize)]) -> Result<()> {
    let weight = Int8Matrix::quantize(&random(&[rows, cols], 0.5, DType::F32)?)?;
    for &(sequences, tokens) in sizes {
        for (dtype, rounding) in DTYPES {
            for threshold in [Some(OUTLIER_THRESHOLD), None] {
                let x = random(&[sequences, tokens, cols], 3.0, dtype)?;
                let bias = random(&[rows], 1.0, DType::F16)?;
                let layer = Int8Linear::new(weight.clone(), Some(bias.clone()), threshold)?;
                let on_gpu = Int8Linear::new(weight.to_device(device)?, Some(bias.to_device(device)?), threshold)?;
                let label = format!("x ({sequences}, {tokens}, {cols}), {rows} rows, {dtype:?}, {threshold:?}");
                check(&label, &on_gpu.forward(&x.to_device(device)?)?, &layer.forward(&x)?, rounding);
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn neighbours_of_a_layer_are_those_of_the_cpu() -> Result<()> {
    seeded();
    let device = gpu();
    let (cols, rows) = (512, 384);
    let [weight, other] = [(); 2].map(|()| Int8Matrix::quantize(&random(&[rows, cols], 0.5, DType::F32).unwrap()));
    let (weight, other) = (weight?, other?);
    let (norm_weight, norm_bias) = (random(&[cols], 2.0, DType::F16)?, random(&[cols], 1.0, DType::F16)?);
    let norm = LayerNorm::new(norm_weight.clone(), norm_bias.clone(), 1e-5)?;
    let gpu_norm = LayerNorm::new(norm_weight.to_device(&device)?, norm_bias.to_device(&device)?, 1e-5)?;
    for tokens in [1, 5, 12, 200] {
        for activation in [None, Some(Activation::Relu), Some(Activation::Gelu), Some(Activation::GeluErf)] {
            let x = random(&[1, tokens, cols], 3.0, DType::F32)?;
            let residual = random(&[1, tokens, 2 * rows], 3.0, DType::F32)?;
            let layers = |device: &Device| {
                let layer = |weight: &Int8Matrix| Int8Linear::new(weight.to_device(device)?, None, Some(6.0));
                Int8LinearGroup::new(vec![layer(&weight)?, layer(&other)?])
            };
            let gpu_residual = residual.to_device(&device)?;
            let wanted = layers(&Device::Cpu)?
                .forward_fused(&x, &Fused { norm: Some(&norm), activation, residual: Some(&residual) })?;
            let fused = Fused { norm: Some(&gpu_norm), activation, residual: Some(&gpu_residual) };
            let found = layers(&device)?.forward_fused(&x.to_device(&device)?, &fused)?;
            // A norm that differs in its last bit may move a value to the next code.
            check(&format!("{tokens} tokens, {activation:?}"), &found, &wanted, 5e-3);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn float_layers_are_those_of_the_cpu() -> Result<()> {
    seeded();
    let device = gpu();
    for (cols, rows, tokens) in [(256, 384, 1), (100, 33, 7), (512, 260, 150)] {
        for (dtype, rounding) in DTYPES {
            let (weight, bias) = (random(&[rows, cols], 0.5, dtype)?, random(&[rows], 1.0, DType::F16)?);
            let layer = FloatLinear::new(weight.clone(), Some(bias.clone()))?;
            let on_gpu = FloatLinear::new(weight.to_device(&device)?, Some(bias.to_device(&device)?))?;
            let (x, residual) = (random(&[1, tokens, cols], 1.0, dtype)?, random(&[1, tokens, rows], 3.0, dtype)?);
            let gpu_residual = residual.to_device(&device)?;
            let found = on_gpu.forward_fused(
                &x.to_device(&device)?,
                &Fused { norm: None, activation: Some(Activation::Relu), residual: Some(&gpu_residual) },
            )?;
            let (x, residual) = (x.to_dtype(DType::F32)?, residual.to_dtype(DType::F32)?);
            let fused = Fused { norm: None, activation: Some(Activation::Relu), residual: Some(&residual) };
            // The product is rounded before what follows it.
            let label = format!("({tokens}, {cols}) times ({rows}, {cols}), {dtype:?}");
            check(&label, &found, &layer.forward_fused(&x, &fused)?, 3.0 * rounding);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn small_ops_are_those_of_the_cpu() -> Result<()> {
    seeded();
    let device = gpu();
    for (dtype, rounding) in DTYPES {
        let (x, other) = (random(&[3, 7, 1000], 5.0, dtype)?, random(&[3, 7, 1000], 5.0, dtype)?);
        let (wide, wide_other) = (x.to_dtype(DType::F32)?, other.to_dtype(DType::F32)?);
        check(
            "add",
            &add(x.to_device(&device)?, &other.to_device(&device)?)?,
            &add(wide.copy()?, &wide_other)?,
            rounding,
        );
        for activation in [Activation::Relu, Activation::Gelu, Activation::GeluErf] {
            let found = activation.forward(x.to_device(&device)?)?;
            check(&format!("{activation:?}"), &found, &activation.forward(wide.copy()?)?, rounding);
        }
        let (weight, bias) = (random(&[1000], 2.0, DType::F16)?, random(&[1000], 1.0, DType::BF16)?);
        let norm = LayerNorm::new(weight.clone(), bias.clone(), 1e-5)?;
        let on_gpu = LayerNorm::new(weight.to_device(&device)?, bias.to_device(&device)?, 1e-5)?;
        check("norm", &on_gpu.forward(&x.to_device(&device)?)?, &norm.forward(&wide)?, rounding);
        let table = Int8Matrix::quantize(&random(&[50, 96], 1.0, DType::F32)?)?;
        let ids = Tensor::new(&[0u32, 49, 7, 7], &Device::Cpu)?;
        let found = table.to_device(&device)?.dequantize_rows(&ids, dtype)?;
        check("rows", &found, &table.dequantize_rows(&ids, DType::F32)?, rounding);
    }
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn attention_is_that_of_the_cpu() -> Result<()> {
    seeded();
    let device = gpu();
    let (batch, heads) = (2, 3);
    let slopes = [0.5f32, 0.25, 0.0625];
    for head_dim in [8, 20, 64, 80, 96, 128, 160] {
        for (cache_dtype, tolerance) in [(CacheDtype::F32, 1e-4), (CacheDtype::F16, 5e-3)] {
            for slopes in [None, Some(&slopes[..])] {
                let run = |device: &Device, parts: &[[Tensor; 3]]| -> Result<Vec<Tensor>> {
                    let like = parts[0][0].to_device(device)?;
                    let (cache, mut past) = (AttentionCache::new(&like, 600, cache_dtype)?, 0);
                    let mut outputs = Vec::new();
                    for part in parts {
                        let [queries, keys, values] = part.each_ref().map(|tensor| tensor.to_device(device));
                        let queries = queries?;
                        cache.write(past, &keys?, &values?)?;
                        outputs.push(attention(&queries, &cache, past, slopes)?);
                        past += queries.dim(2)?;
                    }
                    Ok(outputs)
                };
                // A prompt, one token, a few, and a prompt that follows.
                let parts: Vec<[Tensor; 3]> = [150, 1, 5, 70, 1]
                    .into_iter()
                    .map(|tokens| [(); 3].map(|()| random(&[batch, heads, tokens, head_dim], 1.0, DType::F32).unwrap()))
                    .collect();
                for (found, wanted) in run(&device, &parts)?.iter().zip(run(&Device::Cpu, &parts)?) {
                    let label = format!("head_dim {head_dim}, {cache_dtype:?}, {:?}", wanted.shape());
                    check(&label, found, &wanted, tolerance);
                }
            }
        }
    }
    Ok(())
}

fn load_on(device: &Device, name: &str, precision: Precision) -> Loaded {
    let options = LoadOptions { precision, device: device.clone(), progress: None };
    load(&ModelFolder::open(model(name)).unwrap(), &options).unwrap()
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn logits_of_the_fixtures_are_the_expected_ones() {
    let device = gpu();
    for name in MODELS {
        let golden = tensors(format!("golden/{name}/golden.safetensors"));
        for (precision, tolerance) in [(Precision::F32, 1e-3), (Precision::F16, 1e-2)] {
            let loaded = load_on(&device, name, precision.clone());
            for prompt in json(format!("golden/{name}/golden.json"))["prompts"].as_array().unwrap() {
                let label = prompt["name"].as_str().unwrap();
                let logits = if precision == Precision::F32 { f32_logits } else { logits };
                let mut found = logits(loaded.model.as_ref(), &ids(&prompt["ids"]));
                if let Some(at) = golden.get(&format!("logits_at.{label}")) {
                    found = found.index_select(at, 0).unwrap();
                }
                check(
                    &format!("{name}, {precision:?}, prompt {label}"),
                    &found,
                    &golden[&format!("logits.{label}")],
                    tolerance,
                );
            }
        }
        let bnb = tensors(format!("golden/{name}/int8_bnb.safetensors"));
        let loaded = load_on(&device, name, int8(Some(OUTLIER_THRESHOLD)));
        let prompt = ids(&json(format!("golden/{name}/golden.json"))["prompts"][4]["ids"]);
        let found = logits(loaded.model.as_ref(), &prompt).narrow(0, prompt.len() - 8, 8).unwrap();
        check(&format!("{name}, int8"), &found, &bnb["model.t6.logits_last8"], 0.03);
    }
}

/// As many heads, norms and projections as there are kinds of; bf16, and weights saved in int8.
#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn every_variant_of_the_architectures_is_near_the_reference() {
    let device = gpu();
    let folders = ["bloom-12-heads", "bloom-residual", "bloom-bin", "opt-350m-form", "galactica-form"];
    let folders = folders.into_iter().chain(["opt-plain-norms", "opt-odd", "opt-sharded-bin"]);
    for folder in folders.map(|name| format!("random/{name}")) {
        let golden = tensors(format!("{folder}/expected.safetensors"));
        // Of the logits' own size; int8 has its own error, which on the CPU is as large.
        let bounds = [(Precision::F32, 1e-3), (Precision::F16, 0.01), (Precision::BF16, 0.05), (int8(Some(6.0)), 0.04)];
        for (precision, bound) in bounds {
            check_logits(&load_on(&device, &folder, precision), &golden["input_ids"], &golden["logits"], bound);
        }
    }
    for family in ["bloom", "opt"] {
        let reference = tensors(format!("bnb/{family}/reference.safetensors"));
        let loaded = load_on(&device, &format!("bnb/{family}/bnb_int8"), int8(Some(6.0)));
        check_logits(&loaded, &reference["input_ids"], &reference["logits_int8_thr6_float32"], 0.05);
    }
}

/// The root of the mean squared error, as a share of that of the logits.
fn check_logits(loaded: &Loaded, input_ids: &Tensor, wanted: &Tensor, bound: f32) {
    let input_ids = input_ids.to_dtype(DType::U32).unwrap();
    let found = loaded.model.forward(&input_ids, &mut f32_cache(loaded.model.as_ref())).unwrap();
    let error = rms_error(&found, wanted) / rms_error(wanted, &wanted.zeros_like().unwrap());
    assert!(error <= bound, "{error}, wanted at most {bound}");
}

/// The likeliest token each time.
fn continuation(model: &dyn CausalLm, prompt: &[u32], len: usize, cache_dtype: CacheDtype) -> Vec<u32> {
    let options = GenerateOptions { max_new_tokens: len, cache_dtype: Some(cache_dtype), ..GenerateOptions::default() };
    generate(model, prompt, &options).unwrap().map(|token| token.unwrap()).collect()
}

#[test]
#[ignore = "needs an NVIDIA GPU: make gpu"]
fn continuations_of_the_fixtures_are_the_expected_ones() {
    let device = gpu();
    for name in MODELS {
        let prompts = json(format!("golden/{name}/golden.json"))["prompts"].clone();
        let prompts = prompts.as_array().unwrap();
        let f32 = load_on(&device, name, Precision::F32);
        for prompt in prompts {
            let wanted = ids(&prompt["greedy_ids"]);
            let found = continuation(f32.model.as_ref(), &ids(&prompt["ids"]), wanted.len(), CacheDtype::F32);
            assert_eq!(found, wanted, "{name}, prompt {}", prompt["name"]);
        }
        // Two tokens that are nearly as likely may change places, and what follows is another text then.
        for precision in [Precision::F16, int8(Some(OUTLIER_THRESHOLD))] {
            let (on_gpu, on_cpu) = (load_on(&device, name, precision.clone()), load_model(name, precision.clone()));
            let same = prompts.iter().filter(|prompt| {
                let prompt = ids(&prompt["ids"]);
                continuation(on_gpu.model.as_ref(), &prompt, 12, CacheDtype::F16)
                    == continuation(on_cpu.model.as_ref(), &prompt, 12, CacheDtype::F16)
            });
            let same = same.count();
            println!("{name}, {precision:?}: {same} of {} continuations are the same", prompts.len());
            assert!(2 * same > prompts.len(), "{name}, {precision:?}: {same} of {}", prompts.len());
        }
    }
}
