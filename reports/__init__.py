"""Result files of a sweep: schemas, store, manifest, calibration input, tables and charts."""
