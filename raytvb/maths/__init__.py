"""The maths: tensors in, tensors out. Nothing here knows paths, devices, stores or experiments.

The modules, in the order in which to read them:

- `task_vector`, `mixes`: what a task vector is, and how additions of task vectors are written as
  coefficients.
- `fisher` (with its parts `fisher_recorder` and `fisher_rewrites`), `mask_selection`,
  `masked_adamw` (on `flat_parameters`): TaLoS. They score how sensitive a task is to each
  parameter, select the parameters to keep, and train only those.
- `gram_blocks`, `gram_factor`, `basis_fit`, `basis_registry`, `basis_methods`: bases of task
  vectors. `simplex` and `simplex_columns` are the maths of `ae`. `clustering` is the maths of
  `kmeans` and `spectral`. `online_basis` and `online_refit` are for vectors that arrive a few at a
  time.
- `merge_registry`, `merge_methods`: how T vectors become one. `thresholds`, `trimming`,
  `tall_masks`, `isometry` and `row_sums` are their parts.
- `line_search`, `halving`, `subsets`, `counts`: what a search needs, which is coefficients to try,
  the choice of candidates that go on, subsets of tasks, and counts of right answers.
- `bits`, `seeds`: small helpers.

Both registries can be read without torch: see `method_registry`.
"""
