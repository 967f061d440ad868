"""Every test sees eight CPU devices; one device is the default place of work."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Most of a test's time is LLVM's, on programs that run once: half of it is enough for them.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)

# Runs of the same programs, here and in processes of their own, compile them once a session.
compiled = tempfile.mkdtemp(prefix="sage_jax_tests_")
atexit.register(shutil.rmtree, compiled, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", compiled)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
