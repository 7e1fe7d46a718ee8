"""The published tables as their authors print them (their READMEs and figures), for tests/test_recipes.py; top-1 in percent."""

TABLES = {
    "repdistiller/cifar100": """
pair                 teacher student kd    fitnet at    sp    cc    vid   rkd   pkt   ab    ft    fsp   nst   crd
wrn_40_2-wrn_16_2    75.61   73.26   74.92 73.58  74.08 73.83 73.56 74.11 73.35 74.54 72.50 73.25 72.91 73.68 75.48
wrn_40_2-wrn_40_1    75.61   71.98   73.54 72.24  72.77 72.43 72.21 73.30 72.22 73.45 72.38 71.59 -     72.24 74.14
resnet56-resnet20    72.34   69.06   70.66 69.21  70.55 69.67 69.63 70.38 69.61 70.34 69.47 69.84 69.95 69.60 71.16
resnet110-resnet20   74.31   69.06   70.67 68.99  70.22 70.04 69.48 70.16 69.25 70.25 69.53 70.22 70.11 69.53 71.46
resnet110-resnet32   74.31   71.14   73.08 71.06  72.31 72.69 71.48 72.61 71.82 72.61 70.98 72.37 71.89 71.96 73.48
resnet32x4-resnet8x4 79.42   72.50   73.33 73.50  73.44 72.94 72.97 73.09 71.90 73.64 73.17 72.86 72.62 73.30 75.51
vgg13-vgg8           74.64   70.36   72.98 71.02  71.43 72.68 70.71 71.23 71.48 72.88 70.94 70.58 70.23 71.53 73.94
vgg13-MobileNetV2    74.64   64.60   67.37 64.14  59.40 66.30 64.86 65.56 64.52 67.13 66.06 61.78 -     58.16 69.73
ResNet50-MobileNetV2 79.34   64.60   67.35 63.16  58.58 68.08 65.43 67.57 64.43 66.52 67.20 60.99 -     64.96 69.11
ResNet50-vgg8        79.34   70.36   73.81 70.69  71.84 73.34 70.25 70.30 71.50 73.01 70.65 70.29 -     71.28 74.30
resnet32x4-ShuffleV1 79.42   70.50   74.07 73.59  71.73 73.48 71.14 73.38 72.28 74.10 73.55 71.75 -     74.12 75.11
resnet32x4-ShuffleV2 79.42   71.82   74.45 73.54  72.73 74.56 71.29 73.40 73.21 74.69 74.31 72.50 -     74.68 75.65
wrn_40_2-ShuffleV1   75.61   70.50   74.83 73.73  73.32 74.52 71.38 73.61 72.21 73.89 73.34 72.03 -     74.89 76.05
""",
    "simkd/cifar100": """
pair                     teacher student kd    fitnet at    sp    vid   crd   srrl  semckd simkd simkd,factor-4 simkd,factor-8
resnet32x4-resnet8x4     79.42   73.09   74.42 74.32  75.07 74.29 74.55 75.59 75.39 76.23  78.08 77.88          76.73
resnet32x4-vgg8          79.42   70.46   72.73 72.91  71.90 73.12 73.19 73.54 73.23 75.27  75.76 75.62          74.74
resnet32x4-ShuffleV2_1_5 79.42   74.15   76.82 77.12  77.51 77.18 77.11 77.66 77.55 79.13  79.54 79.48          78.96
""",
    "simkd/cifar100-curves": """
pair                 teacher student fitnet kd    semckd simkd
resnet32x4-resnet8x4 79.34   72.35   74.15  74.76 76.14  78.15
""",
    "simkd/cifar100-semckd": """
pair                 student    kd         fitnet     at         sp         vid        hkd        semckd
resnet32x4-vgg8      70.46±0.29 72.73±0.15 72.91±0.18 71.90±0.13 73.12±0.10 73.19±0.23 72.63±0.12 75.27±0.13
resnet32x4-vgg13     74.82±0.22 77.17±0.11 77.06±0.14 77.23±0.19 77.72±0.33 77.45±0.13 76.76±0.13 79.43±0.02
vgg13-ShuffleV2      72.60±0.12 75.60±0.21 75.44±0.11 75.41±0.10 75.54±0.18 75.22±0.07 76.24±0.09 76.39±0.12
resnet32x4-ShuffleV2 72.60±0.12 75.49±0.24 75.82±0.22 75.91±0.14 75.77±0.08 75.55±0.18 76.64±0.05 77.62±0.32
wrn_40_2-MobileNetV2 65.43±0.29 68.70±0.22 68.64±0.12 68.79±0.13 68.48±0.36 68.37±0.24 69.23±0.16 69.61±0.05
vgg13-vgg8           70.46±0.29 73.38±0.05 73.63±0.11 73.51±0.08 73.53±0.23 73.63±0.07 73.06±0.24 74.43±0.25
resnet32x4-resnet8x4 73.09±0.30 74.42±0.05 74.32±0.08 75.07±0.03 74.29±0.07 74.55±0.10 74.86±0.21 76.23±0.04
""",
    "spot-adaptive/cifar100": """
pair                     teacher student kd    fitnet at    sp    cc    vid   rkd   pkt   ft    nst   crd   sakd,of-fitnet sakd  sakd,of-sp sakd,of-cc sakd,of-vid sakd,of-rkd sakd,of-pkt sakd,of-ft sakd,of-nst sakd,of-crd
resnet56-resnet20        72.34   69.06   70.66 71.05  71.06 70.65 71.03 71.22 71.07 70.72 71.15 70.68 71.48 71.34          71.24 71.29      71.26      71.28       71.25       71.42       71.17      70.77       71.72
resnet110-resnet32       74.31   71.14   73.08 73.19  73.16 72.90 73.07 73.31 72.91 73.32 73.58 72.91 73.68 73.28          73.76 72.98      73.41      73.49       73.50       73.29       73.67      73.71       73.88
resnet32x4-resnet8x4     79.42   72.50   73.33 74.46  75.16 73.93 74.60 74.57 73.55 73.87 74.60 74.03 75.28 74.60          75.42 74.33      74.63      74.88       73.58       74.38       74.75      74.11       75.75
vgg13-vgg8               74.64   70.36   72.98 73.09  73.56 73.24 73.02 73.51 73.38 73.67 73.18 73.33 74.28 73.22          73.64 73.26      73.44      73.55       73.52       73.67       73.58      73.40       74.30
wrn_40_2-wrn_16_2        75.61   73.26   74.92 75.06  75.01 73.23 74.99 74.93 74.46 75.12 75.07 75.03 75.75 75.26          75.18 74.37      75.14      75.54       75.50       75.34       75.03      75.23       75.99
vgg13-MobileNetV2_1_0    74.64   64.60   67.37 72.63  72.12 72.96 72.73 72.10 72.58 72.76 71.99 72.19 73.56 72.93          72.51 72.76      72.78      71.86       72.85       72.79       72.36      72.20       73.82
ResNet50-MobileNetV2_1_0 79.34   64.60   67.35 72.96  71.82 73.17 72.61 73.00 73.05 72.99 72.85 73.01 73.99 73.35          72.30 73.29      72.70      73.10       73.39       73.31       72.91      73.03       74.03
ResNet50-vgg8            79.34   70.36   73.81 73.24  73.60 73.71 73.20 73.24 73.36 73.39 73.11 -     74.14 73.78          73.61 74.21      73.88      73.56       73.57       73.96       73.68      -           74.46
resnet32x4-resnet32      74.92   71.14   72.98 72.07  72.85 72.12 72.44 72.29 71.54 72.04 72.42 72.34 73.29 72.56          72.92 72.38      72.74      72.67       72.11       72.45       72.73      72.74       73.40
wrn_40_2-ShuffleV1       75.61   70.50   74.83 75.21  76.35 76.27 75.24 76.03 75.96 75.66 76.05 75.88 76.17 75.46          76.55 76.76      75.78      76.22       75.47       75.94       75.73      75.73       76.72
""",  # noqa: E501
    "spot-adaptive/tiny_imagenet": """
pair                  teacher student kd    fitnet at    sp    cc    vid   rkd   pkt   ft    nst   crd   sakd,of-fitnet sakd  sakd,of-sp sakd,of-cc sakd,of-vid sakd,of-rkd sakd,of-pkt sakd,of-ft sakd,of-nst sakd,of-crd
resnet56-resnet20     58.34   52.66   53.04 54.50  54.33 53.86 54.03 53.25 53.68 54.20 54.58 53.66 55.04 54.59          55.39 54.69      55.02      53.54       54.18       54.70       54.62      54.21       55.21
resnet110-resnet20    58.46   51.89   53.40 54.04  54.00 53.92 54.26 53.94 53.88 54.00 53.59 53.82 54.83 54.77          54.47 54.39      54.69      54.34       54.23       54.40       53.91      54.33       55.63
vgg13-vgg8            60.09   56.03   57.33 58.05  58.75 58.78 58.18 58.55 58.58 58.96 58.87 58.32 58.88 59.05          58.69 58.83      58.67      59.16       58.64       59.00       58.83      58.55       59.27
wrn_40_2-wrn_16_2     61.26   57.17   59.16 58.88  58.56 56.78 59.04 58.78 59.31 58.39 58.72 57.76 59.42 59.02          58.72 57.65      59.08      59.35       59.43       58.83       59.36      58.80       59.81
vgg13-MobileNetV2_1_0 60.09   57.73   60.02 61.37  60.84 59.64 61.87 61.34 61.45 62.07 61.49 60.56 61.63 61.57          61.22 61.50      61.68      61.47       61.84       62.23       61.60      60.89       62.73
""",  # noqa: E501
    "mdistiller/cifar100": """
pair                 kd    dkd
resnet56-resnet20    70.66 71.97
resnet110-resnet32   73.08 74.11
resnet32x4-resnet8x4 73.33 76.32
wrn_40_2-wrn_16_2    74.92 76.23
wrn_40_2-wrn_40_1    73.54 74.81
vgg13-vgg8           72.98 74.68
resnet32x4-ShuffleV1 74.07 76.45
wrn_40_2-ShuffleV1   74.83 76.70
vgg13-MobileNetV2    67.37 69.71
ResNet50-MobileNetV2 67.35 70.35
resnet32x4-ShuffleV2 74.45 77.07
""",
    "mdistiller/imagenet": """
pair                                kd    dkd
imagenet_resnet34-imagenet_resnet18 71.03 71.70
imagenet_resnet50-mobilenet_v1      70.50 72.05
""",
    "mdistiller/cifar100-dot": """
pair                 kd,without-DOT kd
resnet32x4-resnet8x4 73.33          75.12
vgg13-vgg8           72.98          73.77
resnet32x4-ShuffleV2 74.45          75.55
""",
    "mdistiller/tiny_imagenet-dot": """
pair                      kd,without-DOT kd
ResNet18-MobileNetV2_tiny 58.35          64.01
ResNet18-ShuffleV2        62.26          65.75
""",
    "mdistiller/imagenet-dot": """
pair                                kd,without-DOT kd
imagenet_resnet34-imagenet_resnet18 71.03          71.72
imagenet_resnet50-mobilenet_v1      70.50          73.09
""",
    "quoted/cifar100": """
pair                 reviewkd srrl  semckd simkd
wrn_40_2-wrn_16_2    76.12    -     -      -
wrn_40_2-wrn_40_1    75.09    74.64 74.41  75.56
resnet56-resnet20    71.89    -     -      -
resnet110-resnet32   73.89    -     -      -
resnet32x4-resnet8x4 75.63    75.39 -      -
vgg13-vgg8           74.84    -     -      -
vgg13-MobileNetV2    70.37    -     -      -
ResNet50-MobileNetV2 69.89    -     -      -
resnet32x4-ShuffleV1 77.45    75.18 -      77.18
resnet32x4-ShuffleV2 77.78    -     -      -
wrn_40_2-ShuffleV1   77.14    -     -      -
""",
    "quoted/imagenet": """
pair                                    kd    at    ofd   rkd   crd   srrl  semckd reviewkd simkd
mdistiller_resnet34-mdistiller_resnet18 70.68 70.59 71.08 71.34 71.17 71.73 70.87  71.61    71.66
mdistiller_resnet50-mobilenet_v1        70.68 70.72 71.25 71.32 71.40 72.49 -      72.56    -
""",
    "refilled/cifar100": """
pair                                teacher student refilled refilled,first-phase-by-triplets refilled,first-phase-by-tuples
refilled_wrn_40_2-refilled_wrn_40_2 76.04   76.04   77.49    55.47                            62.12
refilled_wrn_40_2-refilled_wrn_16_2 76.04   70.15   74.01    50.14                            53.86
refilled_wrn_40_2-refilled_wrn_40_1 76.04   71.53   72.72    45.04                            52.71
refilled_wrn_40_2-refilled_wrn_16_1 76.04   66.30   67.56    38.06                            44.33
""",
    "refilled/cub200": """
pair                            teacher student refilled refilled,first-phase-by-triplets refilled,first-phase-by-tuples
mobilenet_v1-mobilenet_v1       76.19   76.19   78.95    36.56                            38.47
mobilenet_v1-mobilenet_v1_x0_75 76.19   74.49   78.01    33.00                            36.95
mobilenet_v1-mobilenet_v1_x0_5  76.19   72.68   76.11    29.60                            33.71
mobilenet_v1-mobilenet_v1_x0_25 76.19   68.80   73.42    19.10                            25.34
""",
    "dist/cifar100": """
pair                 dist
wrn_40_2-wrn_40_1    74.43±0.24
resnet56-resnet20    71.75±0.30
resnet32x4-resnet8x4 76.31±0.19
ResNet50-MobileNetV2 68.66±0.23
resnet32x4-ShuffleV1 76.34±0.18
resnet32x4-ShuffleV2 77.35±0.25
""",
    "dist/imagenet": """
pair                                 dist  kd
imagenet_resnet34-imagenet_resnet18  72.07 71.21
imagenet_resnet50-imagenet_resnet18  72.12 71.35
imagenet_resnet101-imagenet_resnet18 72.08 71.09
imagenet_resnet152-imagenet_resnet18 72.24 71.12
imagenet_resnet50-imagenet_resnet34  75.06 74.73
imagenet_resnet101-imagenet_resnet34 75.36 74.89
imagenet_resnet152-imagenet_resnet34 75.42 74.87
imagenet_resnet50-mobilenet_v1       73.24 -
""",
    "ctkd/cifar100": """
pair               kd    ctkd
resnet56-resnet20  70.66 71.19
resnet110-resnet32 73.08 73.52
resnet110-resnet20 70.66 70.99
wrn_40_2-wrn_16_2  74.92 75.45
wrn_40_2-wrn_40_1  73.54 73.93
vgg13-vgg8         72.98 73.52
""",
    "ctkd/imagenet": """
pair                                kd    ctkd
imagenet_resnet34-imagenet_resnet18 70.83 71.32
""",
    "ctkd/imagenet-dkd": """
pair                                dkd   ctkd
imagenet_resnet34-imagenet_resnet18 71.13 71.51
""",
    "nkd/imagenet": """
pair                                student nkd
imagenet_resnet34-imagenet_resnet18 69.90   71.96
imagenet_resnet50-mobilenet_v1      69.21   72.58
""",
    "nkd/imagenet-uskd": """
pair                                                    uskd
mobilenet_v1-mobilenet_v1                               70.38
imagenet_mobilenet_v2-imagenet_mobilenet_v2             72.41
imagenet_shufflenet_v2_x1_0-imagenet_shufflenet_v2_x1_0 70.30
imagenet_resnet18-imagenet_resnet18                     70.79
imagenet_resnet50-imagenet_resnet50                     77.07
imagenet_resnet101-imagenet_resnet101                   78.54
""",
}

# The README of logit standardisation is one table; here each method has recipes of its own, mlkd and ctkd two.
STANDARDISED = """
pair                 kd    kd+ls ctkd  ctkd+ls dkd   dkd+ls mlkd  mlkd+ls
resnet32x4-resnet8x4 73.33 76.62 73.39 76.67   76.32 77.01  77.08 78.28
vgg13-vgg8           72.98 74.36 73.52 74.47   74.68 74.81  75.18 75.22
wrn_40_2-wrn_40_1    73.54 74.37 73.93 74.58   74.81 74.89  75.35 75.56
wrn_40_2-wrn_16_2    74.92 76.11 75.45 76.08   76.24 76.39  76.63 76.95
resnet56-resnet20    70.66 71.43 71.19 71.34   71.97 72.32  72.19 72.33
resnet110-resnet32   73.08 74.17 73.52 74.01   74.11 74.29  74.11 74.32
resnet110-resnet20   70.67 71.48 70.99 71.39   71.06 71.85  71.89 72.27
resnet32x4-ShuffleV2 74.45 75.56 75.37 76.18   77.07 77.37  78.44 78.76
resnet32x4-wrn_16_2  74.90 75.26 74.57 75.16   75.70 76.19  76.52 77.53
resnet32x4-wrn_40_2  77.70 77.92 77.66 77.99   78.46 78.95  79.26 79.66
wrn_40_2-resnet8x4   73.97 77.11 74.61 77.03   75.56 76.75  77.33 77.68
wrn_40_2-MobileNetV2 68.36 69.23 68.34 69.53   69.28 70.01  70.78 71.61
vgg13-MobileNetV2    67.37 68.61 68.50 68.98   69.71 69.98  70.57 70.94
ResNet50-MobileNetV2 67.35 69.02 68.67 69.36   70.35 70.45  71.04 71.19
"""
