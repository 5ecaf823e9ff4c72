//! Feature `cuda`: every file of `kernels/` becomes a fatbin inside the library.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::compile_kernels();
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::thread;

    /// What chips have machine code in the fatbin; the same list is in `kernels/build.sh`.
    const CHIPS: &[&str] = &["75", "80", "86", "89", "90a"];
    /// What later chips make their own from, at the first start.
    const VIRTUAL_CHIPS: &[&str] = &["75", "80", "90"];

    pub(super) fn compile_kernels() {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
        println!("cargo::rerun-if-changed={}", kernels.display());
        let nvcc = match cudaforge::CudaToolkit::detect() {
            Ok(toolkit) => toolkit.nvcc_path,
            Err(error) => fail(&format!(
                "the feature `cuda` needs nvcc, the compiler of the CUDA toolkit 12.0 or later: {error}. \
                 Install it and set CUDA_HOME, or build with `make cuda`, which fetches it"
            )),
        };
        let mut sources: Vec<PathBuf> = fs::read_dir(&kernels)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .unwrap_or_else(|error| fail(&format!("{}: {error}", kernels.display())));
        sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
        sources.sort();
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        thread::scope(|scope| {
            for source in &sources {
                scope.spawn(|| compile(&nvcc, source, &fatbin(&out, source)));
            }
        });
        let entries = sources.iter().map(|source| {
            let (stem, fatbin) = (stem(source), fatbin(&out, source));
            format!("({stem:?}, include_bytes!({:?})),", fatbin.display().to_string())
        });
        let list = format!("&[{}]", entries.collect::<String>());
        fs::write(out.join("fatbins.rs"), list).unwrap_or_else(|error| fail(&error.to_string()));
    }

    fn compile(nvcc: &Path, source: &Path, fatbin: &Path) {
        let mut command = Command::new(nvcc);
        command.args(["-std=c++17", "-O3", "-fatbin", "-o"]).arg(fatbin).arg(source);
        for chip in CHIPS {
            command.arg(format!("-gencode=arch=compute_{chip},code=sm_{chip}"));
        }
        for chip in VIRTUAL_CHIPS {
            command.arg(format!("-gencode=arch=compute_{chip},code=compute_{chip}"));
        }
        match command.output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).replace('\n', " | ");
                fail(&format!("{}: nvcc failed: {said}", source.display()))
            }
            Err(error) => fail(&format!("{}: {error}", nvcc.display())),
        }
    }

    fn stem(source: &Path) -> String {
        source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn fatbin(out: &Path, source: &Path) -> PathBuf {
        out.join(stem(source)).with_extension("fatbin")
    }

    /// Ends the build with one line.
    fn fail(why: &str) -> ! {
        println!("cargo::error={why}");
        std::process::exit(1)
    }
}
