"""The probe inside other libraries' training loops: `lightning` and `transformers`, each with an extra of its name."""
