"`python -m minibatch` is the command `minibatch`"
from .cli import main
raise SystemExit(main())
