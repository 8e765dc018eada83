"""A stand-in for SLURM on one machine: sbatch, srun, sacct, scancel, scontrol, which do what submitit and Lightning
rely on.

An sbatch script runs at once, in a session of its own; srun starts its tasks with the variables that SLURM sets. It
refuses to start them without --cpus-per-task: since 22.05 they would get one core. `scancel --signal=USR2 JOB` signals
the tasks alone, as SLURM does before the time limit; `scontrol requeue JOB` kills the job and starts its script again.
What it can't show: queues, nodes, time limits.
"""

import os
import sys
from pathlib import Path

SBATCH = r"""
import os, re, subprocess, sys
script = sys.argv[-1]
asked = dict(re.findall(r"#SBATCH --([\w-]+)=(.*)", open(script).read()))
place = os.path.dirname(os.path.abspath(__file__))
number = str(1000 + len([n for n in os.listdir(place) if n.startswith("job-")]))
tasks, nodes = asked.get("ntasks-per-node", "1"), asked.get("nodes", "1")
environment = os.environ | {
    "SLURM_JOB_ID": number, "SLURM_JOB_NAME": asked["job-name"].strip('"'), "SLURM_NNODES": nodes,
    "SLURM_JOB_NUM_NODES": nodes,
    "SLURM_NTASKS_PER_NODE": tasks, "SLURM_NTASKS": str(int(tasks) * int(nodes)), "SLURM_NODELIST": "127.0.0.1",
    "SLURM_JOB_NODELIST": "127.0.0.1",
}
log = open(os.path.join(place, "log-" + number), "w")
done = subprocess.Popen(["bash", script], env=environment, stdout=log, stderr=log, start_new_session=True)
for name, text in (("job", str(done.pid)), ("script", os.path.abspath(script))):
    with open(os.path.join(place, name + "-" + number), "w") as file:
        file.write(text)
print("Submitted batch job", number)
"""
SRUN = r"""
import os, subprocess, sys
words = sys.argv[1:]
if "--wait=0" not in words or not any(word.startswith("--cpus-per-task=") for word in words):
    sys.exit("srun: every task would get one core; give --cpus-per-task and --wait=0")
while words[0].startswith("-"):
    option = words.pop(0)
    if option in ("--output", "--error"):
        words.pop(0)
count, tasks = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
started = []
for rank in range(count):
    own = {"PROCID": rank, "LOCALID": rank % tasks, "NODEID": rank // tasks, "STEP_ID": 0}
    own = {"SLURM_" + name: str(value) for name, value in own.items()}
    started.append(subprocess.Popen(words, env=os.environ | own))
place = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(place, "tasks-" + os.environ["SLURM_JOB_ID"]), "w") as file:
    file.write(" ".join(str(process.pid) for process in started))
sys.exit(max(process.wait() for process in started))
"""
SACCT = r"""
import os, sys
place = os.path.dirname(os.path.abspath(__file__))
print("JobID|State|NodeList")
for number in [word for before, word in zip(sys.argv, sys.argv[1:]) if before == "-j"]:
    process = open(os.path.join(place, "job-" + number)).read()
    try:
        state = open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        state = "Z"
    print(f"{number}|{'COMPLETED' if state == 'Z' else 'RUNNING'}|here")
"""
SCANCEL = r"""
import os, signal, sys
place = os.path.dirname(os.path.abspath(__file__))
if sys.argv[1] == "--signal=USR2":
    for task in open(os.path.join(place, "tasks-" + sys.argv[2])).read().split():
        os.kill(int(task), signal.SIGUSR2)
else:
    os.killpg(int(open(os.path.join(place, "job-" + sys.argv[1])).read()), signal.SIGKILL)
"""
SCONTROL = r"""
import os, signal, subprocess, sys, time
place = os.path.dirname(os.path.abspath(__file__))
assert sys.argv[1] == "requeue"
number = sys.argv[2]
job = os.path.join(place, "job-" + number)
if os.fork():
    sys.exit(0)
os.setsid()
before = int(open(job).read())
open(job, "w").write(str(os.getpid()))
time.sleep(1)  # the task ends by itself, as submitit lets it
try:
    os.killpg(before, signal.SIGKILL)
except ProcessLookupError:
    pass
log = open(os.path.join(place, "log-" + number), "a")
script = open(os.path.join(place, "script-" + number)).read()
started = subprocess.Popen(["bash", script], stdout=log, stderr=log, start_new_session=True)
open(job, "w").write(str(started.pid))
"""


def install(place: Path) -> str:
    """Write the commands into a folder; gives the PATH that finds them first."""
    place.mkdir()
    commands = {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": SCANCEL, "scontrol": SCONTROL}
    for name, text in commands.items():
        (place / name).write_text(f"#!{sys.executable}\n{text}")
        (place / name).chmod(0o755)
    return f"{place}{os.pathsep}{os.environ['PATH']}"
