"""Task vector bases of an experiment: Gram matrix, fits, online bases, written block by block."""
