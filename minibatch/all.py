"Every public name of the package; lives beside the generated modules and is written by hand"
from .files import *
from .datasets import *
from .backprop import *
from .losses import *
from .metrics import *
from .models import *
from .optim import *
from .data import *
from .training import *
from .callbacks import *
from .checkpoint import *
from .distributed import *
from .compiled import *
