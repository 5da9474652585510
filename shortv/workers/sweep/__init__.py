"""A sweep: the Layer Contribution of every decoder layer, measured by workers on a Ray cluster.

spec        what a user asks for: flags, limits, and the arguments that decide the result
driver      checks the input, starts the workers, commits what they send
units       units of work: a batch of samples times a range of layers
pipeline    Ray Data: CPUs prepare inputs, workers measure, results stream back
worker      the two stages; each failure becomes the error of one sample, and each death leaves a trace
measure     one batch on one model
result      finished units to the tables of the folder, and tables to plans
"""
