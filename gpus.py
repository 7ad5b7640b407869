"""What the makers say of their devices."""

import re

# TFLOP/s without sparsity: bfloat16 and float16 on tensor (AMD: matrix) cores with float32 accumulation, and float32
# without TF32. None: no such cores, or no figure that we know. Keys are matched whole, because a prefix would guess: a
# 4090 Laptop is no 4090, and a MIG slice is a fraction of its card. Source: NVIDIA's data sheets and product pages
# (figures "with sparsity" halved); appendix A of the GA102, Ada and RTX Blackwell white papers; AMD's CDNA data sheets.
PEAK_TFLOPS: dict[str, tuple[float | None, float | None, float | None]] = {
    # device name, without NVIDIA or Tesla             bfloat16 float16 float32
    r"V100-PCIE-(16|32)GB":                           (None, 112.0, 14.0),
    r"V100-SXM2-(16|32)GB(-LS)?":                     (None, 125.0, 15.7),
    r"V100S-PCIE-32GB":                               (None, 130.0, 16.4),
    r"T4":                                            (None, 65.0, 8.1),
    r"GeForce RTX 2080 Ti":                           (None, 56.9, 14.2),
    r"A10":                                           (125.0, 125.0, 31.2),
    r"A10G":                                          (70.0, 70.0, 35.0),
    r"A30":                                           (165.0, 165.0, 10.3),
    r"A40":                                           (149.7, 149.7, 37.4),
    r"A[18]00(-SXM4-(40|80)GB|-PCIE-40GB| 80GB PCIe)": (312.0, 312.0, 19.5),
    r"RTX A6000":                                     (154.8, 154.8, 38.7),
    r"GeForce RTX 3080":                              (59.5, 59.5, 29.8),  # with 10 GB
    r"GeForce RTX 3090":                              (71.0, 71.0, 35.6),
    r"GeForce RTX 3090 Ti":                           (80.0, 80.0, 40.0),
    r"L4":                                            (121.0, 121.0, 30.3),
    r"L40":                                           (181.0, 181.0, 90.5),
    r"L40S":                                          (362.0, 362.0, 91.6),
    r"RTX 6000 Ada Generation":                       (364.2, 364.2, 91.1),
    r"GeForce RTX 4070":                              (58.3, 58.3, 29.1),
    r"GeForce RTX 4080":                              (97.5, 97.5, 48.7),
    r"GeForce RTX 4080 SUPER":                        (104.4, 104.4, 52.2),
    r"GeForce RTX 4090":                              (165.2, 165.2, 82.6),
    r"GeForce RTX 5080":                              (112.6, 112.6, 56.3),
    r"GeForce RTX 5090":                              (209.5, 209.5, 104.8),
    r"RTX PRO 6000 Blackwell Workstation Edition":    (503.8, 503.8, 126.0),
    r"H100 80GB HBM3|H[28]00|GH200 (480GB|144G HBM3e)": (989.4, 989.4, 66.9),  # H100 SXM5
    r"H100 PCIe":                                     (756.0, 756.0, 51.2),
    r"H[12]00 NVL":                                   (835.5, 835.5, 60.0),
    r"H20":                                           (148.0, 148.0, 44.0),
    r"B200":                                          (2250.0, 2250.0, 75.0),
    r"GB200":                                         (2500.0, 2500.0, 80.0),
    r"B300( SXM6 AC)?":                               (2250.0, 2250.0, 75.0),
    r"GB300":                                         (2500.0, 2500.0, 80.0),
    r"AMD Instinct MI210":                            (181.0, 181.0, 45.3),
    r"AMD Instinct MI250X":                           (191.5, 191.5, 47.9),  # a device is half a card
    r"AMD Instinct MI3(00|25)X( OAM)?":               (1307.4, 1307.4, 163.4),
    r"AMD Instinct MI355X( OAM)?":                    (2516.6, 2516.6, 157.3),
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device as torch names it, FLOP/s in that dtype; None if it is not in PEAK_TFLOPS (any CPU)."""
    name = re.sub(r"^(NVIDIA |Tesla )+", "", device_name.strip())
    found = next((tflops for pattern, tflops in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)), (None,) * 3)
    peak = dict(zip(("bfloat16", "float16", "float32"), found, strict=True)).get(dtype)
    return None if peak is None else peak * 1e12
