"""The evaluation harness lm_eval on our models: log-likelihoods of many texts in few evaluations, its model class."""
