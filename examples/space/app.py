"""The demo as a Hugging Face Space; the variable DOD_MODEL of the Space names the model."""

from diffusers_dod.demo.__main__ import main


raise SystemExit(main())
