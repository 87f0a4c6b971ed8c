//! What users ask for: submissions and cordons. Cancelling is part of a gang's life, in `gang.rs`.

use crate::core::Core;
use crate::effects::{Effects, Refusal, Reply};
use crate::job::{Job, JobState};
use crate::owners::{Caller, Rights};
use crate::types::{Generation, JobId, JobSpec, Millis, Owner, RequestId};

impl Core {
    pub(crate) fn submit(
        &mut self,
        now: Millis,
        by: Caller,
        request_id: Option<RequestId>,
        spec: JobSpec,
        fx: &mut Effects,
    ) -> Result<&Job, Refusal> {
        let Caller { name: owner, rights } = by;
        let request = request_id.clone().map(|request| (owner.clone(), request));
        if let Some((id, (_, request))) =
            request.as_ref().and_then(|request| Some((self.requests.get(request)?, request)))
        {
            let job = &self.jobs[id];
            if job.spec == spec {
                return Ok(job);
            }
            return Err(Refusal::RequestReused { request_id: request.to_string(), job: id.clone() });
        }
        if rights != Rights::All && spec.priority > self.config.priority_max {
            return Err(Refusal::Priority { asked: spec.priority, most: self.config.priority_max });
        }
        self.backlog.admit(owner.as_ref(), &spec, &self.config.queue_max)?;
        let id = self.mint_job_id();
        fx.meta_changed = true;
        if let Some(request) = request {
            self.requests.insert(request, id.clone());
        }
        let job = Job {
            id: id.clone(),
            order: self.meta.orders,
            owner,
            cancelled_by: None,
            request_id,
            spec,
            state: JobState::Queued,
            generation: Generation(0),
            restarts_used: 0,
            reason: "waiting to be placed".to_owned(),
            quoted: None,
            gang: None,
            exit: None,
            past: Vec::new(),
            created: now,
            started: None,
            finished: None,
            not_before: Millis(0),
            port_retries: 0,
            last_call_ends: None,
        };
        self.by_order.insert(job.order, id.clone());
        self.jobs.insert(id.clone(), job);
        self.enqueue(&id);
        fx.store_job(&id);
        self.schedule(now, fx);
        Ok(&self.jobs[&id])
    }

    /// Ids are short enough to type and differ between clusters: a counter, scrambled with the seed.
    fn mint_job_id(&mut self) -> JobId {
        const ALPHABET: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz023456789";
        loop {
            self.meta.orders += 1;
            let mut bits = splitmix64(self.meta.seed ^ splitmix64(self.meta.orders));
            let text: String = std::iter::repeat_with(|| {
                let digit = ALPHABET[(bits % 32) as usize];
                bits /= 32;
                char::from(digit)
            })
            .take(8)
            .collect();
            if let Ok(id) = JobId::new(text)
                && !self.jobs.contains_key(&id)
            {
                return id;
            }
        }
    }

    pub(crate) fn set_cordon(
        &mut self,
        now: Millis,
        by: Option<Owner>,
        name: &str,
        cordon: Option<String>,
        fx: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let name = self.node(name)?.name.clone();
        let Some(node) = self.nodes.get_mut(&name) else { return Err(Refusal::NoNode(name.to_string())) };
        // Giving a node back ends a drain as well.
        let drain = if cordon.is_none() { None } else { node.drain.clone() };
        // So does it end a quarantine whose cause is gone.
        let forgiven = cordon.is_none() && node.health.forgive(now);
        if node.cordon != cordon || node.drain != drain || forgiven {
            (node.cordoned_by, node.uncordoned_by) = (None, None);
            if cordon.is_none() {
                self.room.appear();
                node.uncordoned_by = by;
            } else {
                node.cordoned_by = by;
            }
            (node.cordon, node.drain) = (cordon, drain);
            node.changed = now;
            fx.store_node(&name);
        }
        Ok(Reply::Node(Box::new(node.clone())))
    }
}

/// A mixing function whose outputs differ for different inputs (Steele et al., "Fast splittable
/// pseudorandom number generators", 2014).
fn splitmix64(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
