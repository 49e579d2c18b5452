"""The maths: tensors in, tensors out. Nothing here knows paths, devices, stores or experiments.

In which order to read:

- `task_vector`, `mixes`: what a task vector is, and additions of them as coefficients.
- `fisher` (with its parts `fisher_recorder` and `fisher_rewrites`), `mask_selection`,
  `masked_adamw` (on `flat_parameters`): TaLoS. Which parameters a task is sensitive to, which are
  kept, and how only those are trained.
- `gram`, `gram_factor`, `basis_fit`, `basis_registry`, `basis_methods`: bases of task vectors.
  `simplex` and `simplex_columns` are the maths of `ae`, `clustering` that of the cluster means;
  `online_basis` and `online_refit` are for vectors that arrive a few at a time.
- `merge_registry`, `merge_methods`: how T vectors become one. `thresholds`, `trimming`,
  `tall_masks`, `isometry` and `row_sums` are their parts.
- `line_search`, `halving`, `subsets`, `counts`: what a search needs. Coefficients to try,
  candidates that go on, subsets of tasks, counts of right answers.
- `bits`, `seeds`: small helpers.

Both registries can be read without torch: see `method_registry`.
"""
