"""The job: YAML, overrides, validation, messages, redaction."""
