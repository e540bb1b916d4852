"""``lvlm-probe study``: whole studies, models × data sets × methods, that stop and resume, and their tables."""

HELP = "Whole studies: models × data sets × methods from one YAML file, and the paper's tables of them."
