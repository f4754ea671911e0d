"""NVIDIA's GPUs: peak rate, memory and link of each, for MFU and --plan."""

import re
from typing import NamedTuple


class GPU(NamedTuple):
    model: str  # words of the device's own name
    tflops: float  # dense 16-bit matrix products that accumulate in fp32, without sparsity
    memory_gb: int
    link: int  # GB/s in one direction to the other GPUs of a node: NVLink, or PCIe where there is none
    source: str  # the document of NVIDIA's that has the rate

    @property
    def plan_name(self) -> str:
        """Name for --plan: "RTX4090-24GB"."""
        return f"{self.model.replace(' ', '')}-{self.memory_gb}GB"


# Data sheets often give the rate with sparsity, which is twice as high. GeForce cards accumulate in fp32 at
# half of the advertised rate, which is for fp16. P100 and GTX 1650 have no matrix units, so their 16-bit
# products that accumulate in fp32 run at the fp32 rate.
GPUS = (
    GPU("B300", 2250, 288, 900, "HGX B300 data sheet"),
    GPU("GB300", 2500, 288, 900, "GB300 NVL72 data sheet"),
    GPU("B200", 2250, 180, 900, "HGX B200 data sheet"),
    GPU("GB200", 2500, 186, 900, "GB200 NVL72 data sheet"),
    GPU("H200", 989, 141, 450, "H200 data sheet"),
    GPU("H200 NVL", 835, 141, 450, "H200 data sheet"),
    GPU("GH200", 989, 96, 450, "GH200 data sheet"),
    GPU("H100", 989, 80, 450, "H100 data sheet"),
    GPU("H100 NVL", 835, 94, 64, "H100 NVL product brief"),
    GPU("H100 PCIe", 756, 80, 64, "H100 PCIe data sheet"),
    GPU("A100", 312, 40, 300, "A100 data sheet"),
    GPU("A100", 312, 80, 300, "A100 data sheet"),
    GPU("A10G", 70, 24, 16, "A10G data sheet"),
    GPU("A10", 125, 24, 32, "A10 data sheet"),
    GPU("A40", 150, 48, 32, "A40 data sheet"),
    GPU("L40S", 362, 48, 32, "L40S data sheet"),
    GPU("L40", 181, 48, 32, "L40 data sheet"),
    GPU("L4", 121, 24, 32, "L4 data sheet"),
    GPU("T4", 65, 16, 16, "T4 data sheet"),
    GPU("V100 SXM2", 125, 32, 150, "V100 data sheet"),
    GPU("V100 PCIE", 112, 16, 16, "V100 data sheet"),
    GPU("P100 SXM2", 10.6, 16, 80, "P100 data sheet"),
    GPU("P100 PCIE", 9.3, 16, 16, "P100 PCIe data sheet"),
    GPU("RTX PRO 6000", 504, 96, 64, "RTX Blackwell PRO architecture white paper"),
    GPU("RTX 6000 Ada", 364, 48, 32, "RTX 6000 Ada data sheet"),
    GPU("RTX A6000", 155, 48, 32, "RTX A6000 data sheet"),
    GPU("RTX A5000", 111, 24, 32, "RTX A5000 data sheet"),
    GPU("RTX A4000", 77, 16, 32, "RTX A4000 data sheet"),
    GPU("RTX 5090", 209.5, 32, 64, "RTX Blackwell architecture white paper"),
    GPU("RTX 5080", 112.6, 16, 64, "RTX Blackwell architecture white paper"),
    GPU("RTX 5070", 61.7, 12, 64, "RTX Blackwell architecture white paper"),
    GPU("RTX 4090", 165, 24, 32, "Ada architecture white paper"),
    GPU("RTX 4080", 97, 16, 32, "Ada architecture white paper"),
    GPU("RTX 4070", 58.3, 12, 32, "Ada architecture white paper"),
    GPU("RTX 4060", 30.2, 8, 16, "GeForce RTX 4060 specifications: 242 AI TOPS, an eighth of it"),
    GPU("RTX 3090", 71, 24, 32, "GA102 architecture white paper"),
    GPU("RTX 3080", 60, 10, 32, "GA102 architecture white paper"),
    GPU("RTX 3060", 25.5, 12, 32, "GeForce RTX 3060 specifications: 12.7 TFLOPS in fp32, twice that"),
    GPU("RTX 2080 Ti", 53.8, 11, 16, "Turing architecture white paper"),
    GPU("GTX 1650", 2.98, 4, 16, "GeForce GTX 1650 specifications: 896 cores at 1665 MHz, 2 operations each"),
)

# Words that make a name mean another card, or a part of one.
VARIANTS = {"ti", "super", "d", "laptop", "mobile", "max", "mig"}


def find(device_name: str) -> GPU | None:
    """Find the GPU behind a device name ("NVIDIA A100-SXM4-80GB"): the longest match by whole words.

    None if there is no match, or only a variant that the table lacks, such as "RTX 4070 Laptop GPU". If a
    card has several memory sizes, returns the first, because their rates are equal.
    """
    words = _words(device_name)
    found = [gpu for gpu in GPUS if _contains(words, _words(gpu.model))]
    best = max(found, key=lambda gpu: len(_words(gpu.model)), default=None)
    if best is None or VARIANTS & (set(words) - set(_words(best.model))):
        return None
    return best


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[i : i + len(part)] == part for i in range(len(words)))
