"""The benchmarks: a new one is one row here."""

from __future__ import annotations

from bench.agreement import AgreementCost
from bench.compile_growth import CompileGrowth
from bench.compile_time import CompileTime
from bench.growth import ALONE, EAGER, INDUCTOR, PAIR, Growth
from bench.kernels import Kernels
from bench.masks import Masks
from bench.options import Benchmark
from bench.outputs import Outputs
from bench.ranks import Ranks
from bench.variants import VariantsCompile
from bench.warm_start import WarmStart

BENCHMARKS: dict[str, Benchmark] = {
    "layer": Growth("a textbook causal linear attention layer, B1 H8 D64", "layer", (EAGER, INDUCTOR, ALONE)),
    "model": Growth("linear_llama3:tiny, pattern LLLN, B1", "model", (EAGER, INDUCTOR, ALONE, PAIR)),
    "loops": CompileGrowth("compile time of other people's loops over chunks, one training step"),
    "agreement": AgreementCost("comparing the ranks' inputs, linear_llama3:tiny on 2 ranks, one step"),
    "compile": CompileTime("compile time of linear_llama3:tiny with 16 layers, forward and backward"),
    "variants": VariantsCompile("processor seconds to compile layers of every variant, forward and backward"),
    "warm": WarmStart("processor seconds of the first step in a process, compiler caches empty, then filled"),
    "kernels": Kernels("Triton kernels: on a GPU their times, elsewhere machine code, launches, bytes"),
    "masks": Masks("softmax attention under each kind of mask, B1 H2 D64, one training step on two ranks"),
    "ranks": Ranks("every way across two ranks, linear_llama3 with 4 layers of 128, B1, Gloo on loopback"),
    "ranks-softmax": Ranks("the same of softmax layers alone", models=("softmax",)),
    "ranks-many": Ranks("the same across four and eight ranks", ranks=(4, 8)),
    "outputs": Outputs("Hugging Face Llama that returns logits and cache, a training step on two ranks"),
}
